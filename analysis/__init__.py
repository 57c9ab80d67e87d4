"""What a store says about a curriculum. Functions on a store alone; this release: what a selection is made of."""
