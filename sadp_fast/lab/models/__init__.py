"""Spiking networks for images and event frames: layers of torch.nn and this package's neurons, nothing else.

One file for each family; `layers` has what they share, `registry` how they are named, built and trained.
"""

from .layers import PerStep, SpikingNetwork
from .registry import MODELS, NAMES, WEIGHT_DECAY, build
from .sew_resnet import SEWBlock

__all__ = ["MODELS", "NAMES", "WEIGHT_DECAY", "PerStep", "SEWBlock", "SpikingNetwork", "build"]
