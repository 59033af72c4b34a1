"""The exact norm of each example's gradient: what the scores stand in for, at the price of per-example gradients.

For studies, for tests, and for training small models by it. Normalisation is frozen at its running statistics: with
those of the batch, an example's gradient would depend on the others in it, and there would be no norm of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from ..nn.node import at_rest, neurons, reset
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
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False), _evaluating(model), at_rest(model):
        try:
            with _in_plain_torch(model):
                parts = [_batched(model, trained, *part, criterion) for part in _chunks(x, y, chunk)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # what is wrong with the model itself, the loop raises again
            parts = [_one_by_one(model, trained, *part, criterion) for part in _chunks(x, y, 1)]
    return torch.cat(parts)


def _chunks(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def _batched(
    model: nn.Module, trained: dict[str, Tensor], x: Tensor, y: Tensor, criterion: Callable[..., Tensor]
) -> Tensor:
    own = {name: p.expand(x.shape[0], *p.shape).requires_grad_() for name, p in trained.items()}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return criterion(functional_call(model, parameters, (x.unsqueeze(0),)), y.unsqueeze(0))

    reset(model)
    losses = vmap(loss)(own, x, y)
    return _norms(torch.autograd.grad(losses.sum(), list(own.values()), allow_unused=True))


def _one_by_one(
    model: nn.Module, trained: dict[str, Tensor], x: Tensor, y: Tensor, criterion: Callable[..., Tensor]
) -> Tensor:
    reset(model)
    own = {name: p.clone().requires_grad_() for name, p in trained.items()}
    loss = criterion(functional_call(model, own, (x,)), y)
    gradients = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
    return _norms(tuple(None if g is None else g.unsqueeze(0) for g in gradients))


def _norms(gradients: tuple[Tensor | None, ...]) -> Tensor:
    """Norm over all parameters of gradients [N, *]."""
    each = [torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients if g is not None]
    return torch.linalg.vector_norm(torch.stack(each), dim=0)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards everything is as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _in_plain_torch(model: nn.Module) -> Iterator[None]:
    """Neurons made of torch operations alone, which vmap can batch."""
    before = [(node, node.backend, node.surrogate_function) for node in neurons(model).values()]
    try:
        for node, _, surrogate in before:
            node.backend = "torch"
            index = fused_index(surrogate)
            if index is not None:
                alpha: float = surrogate.alpha  # type: ignore[union-attr]
                node.surrogate_function = _Spike(FUSED[index].gradient, alpha)
        yield
    finally:
        for node, backend, surrogate in before:
            node.backend, node.surrogate_function = backend, surrogate


class _Spike(nn.Module):
    """A surrogate as an expression rather than an autograd.Function: the step's value, the surrogate's gradient."""

    def __init__(self, gradient: Callable[[Tensor, float], Tensor], alpha: float) -> None:
        super().__init__()
        self.gradient, self.alpha = gradient, alpha

    def forward(self, x: Tensor) -> Tensor:
        fixed = x.detach()
        return (fixed >= 0).to(x.dtype) + self.gradient(fixed, self.alpha) * (x - fixed)
