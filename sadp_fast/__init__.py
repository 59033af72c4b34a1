"""Spike-aware data pruning for spiking neural networks, with fused neuron kernels (arXiv 2510.04098)."""

from . import surrogate
from .batch_norm_lif import BatchNormIF, BatchNormLIF, BatchNormParametricLIF
from .casting import cast_weights_at_once
from .graphs import GraphedStep
from .neuron import IFNode, LIFNode, ParametricLIFNode, reset
from .ops.autotune import autotune
from .pruner import SADP
from .sampling import Sample, sample
from .selection import inclusion_probabilities, prune_ratios
from .spike_storage import packed_spikes

__version__ = "0.1.0"

__all__ = [
    "SADP",
    "BatchNormIF",
    "BatchNormLIF",
    "BatchNormParametricLIF",
    "GraphedStep",
    "IFNode",
    "LIFNode",
    "ParametricLIFNode",
    "Sample",
    "autotune",
    "cast_weights_at_once",
    "inclusion_probabilities",
    "packed_spikes",
    "prune_ratios",
    "reset",
    "sample",
    "surrogate",
]
