"""A run: the loop, its rollouts, checkpoints, recovery and records."""
