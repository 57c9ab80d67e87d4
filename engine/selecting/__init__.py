"""Selectors (scores for problems), selections (the chosen problems) and their export."""
