"""A network's BatchNormLIF as the layers that it fuses: the oracle of what is built of it."""

import copy

from torch import nn

from sadp_fast import BatchNormLIF, LIFNode


class Unfused(nn.Module):
    """nn.BatchNorm and a LIFNode one after the other, with a BatchNormLIF's weights, constants and arguments."""

    def __init__(self, fused: BatchNormLIF) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(fused.num_features, fused.eps, fused.momentum)
        self.norm._check_input_dim = lambda x: None  # it normalises any number of dimensions
        self.norm.to(fused.weight)
        self.norm.load_state_dict({key: value.clone() for key, value in fused.state_dict().items()})
        self.node = LIFNode(
            fused.tau,
            fused.decay_input,
            fused.v_threshold,
            fused.v_reset,
            fused.surrogate_function,
            fused.detach_reset,
            fused.step_mode,
        )

    def forward(self, x, residual=None, *, repeat=None):
        if repeat is not None:
            y = self.norm(x)
            y = y.expand(repeat, *y.shape)
        elif self.node.step_mode == "s":
            y = self.norm(x)
        else:
            y = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        spikes = self.node(y)
        return spikes if residual is None else spikes + residual


def unfused(model: nn.Module) -> nn.Module:
    """A copy of the model, with the same weights in the same order."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, BatchNormLIF):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Unfused(module).train(module.training))
    return model
