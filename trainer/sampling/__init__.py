"""Sampling of responses from a model, and their rewards."""
