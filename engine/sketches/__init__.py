"""From gradients to stored sketches: projections, the sketcher, collection, and fidelity of the ranking."""
