"""The selection round of a training run, the same for every trainer: see driver.py."""
