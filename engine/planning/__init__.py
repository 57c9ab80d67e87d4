"""What a run takes in time, memory and disk, from a model's configuration alone."""
