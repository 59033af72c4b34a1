"""Multi-step integrate-and-fire."""
