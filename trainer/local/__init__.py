"""GRPO with transformers on one machine: policy, update, loop and checkpoints, small enough to read in one sitting."""
