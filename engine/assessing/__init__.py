"""Quality of rankings by sketches: fidelity to exact gradients, and split-half reliability of the rollouts."""
