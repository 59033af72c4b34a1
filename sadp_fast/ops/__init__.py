"""The operators, one folder each: reference.py in plain torch, kernels.py in Triton, launch.py, op.py for autograd."""
