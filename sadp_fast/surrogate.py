"""The surrogate gradients under their public name, ``sadp_fast.surrogate``; they live in ``nn/surrogate.py``."""

from .nn.surrogate import *  # noqa: F403
