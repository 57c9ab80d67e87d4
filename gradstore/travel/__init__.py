"""Stores that travel: pushed to object storage compressed, pulled back, or searched where they lie (docs/remote.md)."""
