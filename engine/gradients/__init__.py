"""Gradients of policies: objectives, micro-batches, one pass through a model, exact products."""
