"""Batch normalisation, multi-step integrate-and-fire and a residual sum, in one pass over memory."""
