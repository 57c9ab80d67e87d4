"""Probe mode: alignments from forward passes alone, with a standard error for each."""
