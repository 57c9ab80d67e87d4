"""Adapters: a feed (trainer/feed.py) in the form of another trainer's data source. docs/trainers.md."""
