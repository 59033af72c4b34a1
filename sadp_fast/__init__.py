"""Spike-aware data pruning for spiking neural networks, with fused neuron kernels (arXiv 2510.04098)."""

from . import surrogate
from .memory.packed_spikes import packed_spikes
from .memory.weight_casting import cast_weights_at_once
from .nn.batch_norm_lif import BatchNormIF, BatchNormLIF, BatchNormParametricLIF
from .nn.lif import IFNode, LIFNode, ParametricLIFNode
from .nn.node import reset
from .ops.common.autotune import autotune
from .prune.graphed_step import GraphedStep
from .prune.policies import Policy
from .prune.probabilities import inclusion_probabilities
from .prune.sadp import SADP
from .prune.sampling import Sample, sample
from .prune.schedule import prune_ratios
from .prune.scores import Score
from .prune.settings import Settings
from .statistics.record import record

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
    "Policy",
    "Sample",
    "Score",
    "Settings",
    "autotune",
    "cast_weights_at_once",
    "inclusion_probabilities",
    "packed_spikes",
    "prune_ratios",
    "record",
    "reset",
    "sample",
    "surrogate",
]
