"""Spike-aware data pruning for spiking neural networks, with fused neuron kernels (arXiv 2510.04098)."""

from . import surrogate
from .memory.packed_spikes import packed_spikes
from .memory.weight_casting import cast_weights_at_once
from .nn.batch_norm_lif import BatchNormIF, BatchNormLIF, BatchNormParametricLIF
from .nn.neuron import IFNode, LIFNode, ParametricLIFNode, reset
from .ops.common.autotune import autotune
from .prune.graphed_step import GraphedStep
from .prune.probabilities import inclusion_probabilities
from .prune.sadp import SADP
from .prune.sampling import Sample, sample
from .prune.schedule import prune_ratios

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
