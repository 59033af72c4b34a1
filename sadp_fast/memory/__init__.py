"""Less memory and fewer launches for a training step, its results unchanged to the bit."""
