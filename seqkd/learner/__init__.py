"""What one learner rank computes: micro-batches, the student, statistics per token, the loss."""
