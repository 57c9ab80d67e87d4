"""Selection rounds of a training run, shared by all trainers; driver.py is the entry point."""
