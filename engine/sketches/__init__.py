"""From gradients to stored sketches: projections, the sketcher, collecting, and how faithful they are."""
