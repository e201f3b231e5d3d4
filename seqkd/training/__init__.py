"""Training runs: loop, rollouts, checkpoints, recovery and records."""
