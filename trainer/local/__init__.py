"""GRPO with transformers on one machine: policy, update, training loop and checkpoints, in a few short files."""
