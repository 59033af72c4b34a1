"""Plain torch versions of every fused path: the specification, the tests' oracle and the CPU path."""
