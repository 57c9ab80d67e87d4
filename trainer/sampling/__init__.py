"""Responses sampled from a model, and what they are paid."""
