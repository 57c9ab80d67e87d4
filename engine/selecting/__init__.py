"""Selectors, selections and their export."""
