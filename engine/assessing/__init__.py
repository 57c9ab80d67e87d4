"""How far rankings by sketches can be trusted: against exact gradients, and between halves of the rollouts."""
