"""Fused Triton operators, one file each: kernel, launcher, registered operator, autograd function."""
