"""Spikes packed into bits, and back."""
