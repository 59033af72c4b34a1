"""Spike-aware data pruning: from scores to the batches of the next epoch."""
