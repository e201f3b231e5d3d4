"""Computations of one learner rank: micro-batches, the student, per-token statistics, the loss."""
