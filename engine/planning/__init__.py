"""Estimates of a run's time, memory and disk space, from a model's configuration alone."""
