"""The exact norm of each example's gradient: what the scores stand in for, at the price of per-example gradients.

For studies, for tests, and for training small models by it. Normalisation is frozen at its running statistics: with
those of the batch, an example's gradient would depend on the others in it, and there would be no norm of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..nn.node import at_rest, neurons, reset, restored
from ..nn.surrogate import FUSED, fused_index

_GRADIENT_BYTES = 1 << 28  # of per-example gradients that are held at once
_LARGEST_CHUNK = 128  # examples at once, for the sake of the activations


def gradient_norms(
    model: nn.Module, x: Tensor, y: Tensor, criterion: Callable[..., Tensor], *, weights_only: bool = False
) -> Tensor:
    """|grad loss_i| of each example, over all trainable parameters, with the normalisation's running statistics.

    Every example gets parameters of its own by ``torch.vmap``, and one backward pass gives the gradients of all; this
    package's neurons run in plain torch for it. Where a model holds operations that vmap cannot batch (SpikingJelly's
    surrogates, custom kernels), its examples pass one by one. Autocast does not act: norms are of x's own dtype, or of
    the parameters' where x is of lower precision.

    Args:
        model: left as it is, its state, gradients and running statistics included.
        x: inputs [N, *].
        y: targets [N, *].
        criterion: loss of outputs and targets, a mean (or sum) over the batch, which is one example here.
        weights_only: leave out parameters of fewer than two dimensions (biases, normalisation, time constants): the
            spike-aware score bounds the rest, weight matrices and convolution kernels.

    Returns:
        float [N], detached, on x's device.

    Raises:
        ValueError: the model has no such trainable parameter.
    """
    trained = {
        name: p.detach() for name, p in model.named_parameters() if p.requires_grad and (p.ndim > 1 or not weights_only)
    }
    if not trained:
        raise ValueError("model has no trainable parameter to take gradients of: set requires_grad=True on some")
    if x.is_floating_point():
        x = x.to(torch.promote_types(x.dtype, next(iter(trained.values())).dtype))
    size = sum(p.numel() * p.element_size() for p in trained.values())
    chunk = max(1, min(_LARGEST_CHUNK, _GRADIENT_BYTES // size))
    modules = list(model.modules())
    no_autocast = torch.autocast(x.device.type, enabled=False)
    with torch.enable_grad(), no_autocast, restored(modules, "training"), at_rest(model):
        model.eval()
        try:
            with restored(neurons(model).values(), "backend", "surrogate_function"):
                _use_plain_torch(model)
                parts = zip(x.split(chunk), y.split(chunk), strict=True)
                return torch.cat([_norms(model, trained, *part, criterion, vmap) for part in parts])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what is wrong with the model itself, the loop raises again
            parts = zip(x.split(1), y.split(1), strict=True)
            return torch.cat([_norms(model, trained, *part, criterion, _one_by_one) for part in parts])


def _one_by_one(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """In the place of vmap, for one example."""
    return lambda parameters, x, y: loss({name: p[0] for name, p in parameters.items()}, x[0], y[0])


def _norms(
    model: nn.Module,
    trained: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    criterion: Callable[..., Tensor],
    over_examples: Callable[..., Callable[..., Tensor]],
) -> Tensor:
    """Norm over all parameters of each example's gradients, [N]."""
    own = {name: p.expand(x.shape[0], *p.shape).requires_grad_() for name, p in trained.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    reset(model)
    losses = over_examples(loss)(own, x, y)
    gradients = torch.autograd.grad(losses.sum(), list(own.values()), allow_unused=True)
    each = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients if g is not None]
    norms: Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return norms


def _use_plain_torch(model: nn.Module) -> None:
    """Let neurons be made of torch operations alone, which vmap can batch."""
    for node in neurons(model).values():
        node.backend = "torch"
        index = fused_index(node.surrogate_function)
        if index is not None:
            alpha: float = node.surrogate_function.alpha  # type: ignore[union-attr]
            node.surrogate_function = _Spike(FUSED[index].gradient, alpha)


class _Spike(nn.Module):
    """A surrogate as an expression rather than an autograd.Function: the step's value, the surrogate's gradient."""

    def __init__(self, gradient: Callable[[Tensor, float], Tensor], alpha: float) -> None:
        super().__init__()
        self.gradient, self.alpha = gradient, alpha

    def forward(self, x: Tensor) -> Tensor:
        fixed = x.detach()
        return (fixed >= 0).to(x.dtype) + self.gradient(fixed, self.alpha) * (x - fixed)
