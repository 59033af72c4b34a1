"""Kernels prepared for one shape, layout, dtype, neuron, ..., and kept: one base for all operators.

The first call with a key works out how a kernel is launched; all others look up one dictionary, and launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor

from .autotune import Choices, at_the_start

C = TypeVar("C", bound=Hashable)  # a kernel's configuration
V = TypeVar("V")


class Plan(Protocol):
    """A kernel with the ``Launch`` of one configuration."""

    @property
    def run(self) -> Callable[..., Any]:
        """Launches it with x and the other tensors."""


class Prepared(Generic[C]):
    """A kernel prepared for one key, in the configuration that its first run chooses: the curated one, or autotune's.

    Args:
        choices: of the kernel.
        key: shape, layout, dtype, device and whatever else the kernel's speed depends on.
        candidates: gives the configurations for x, the curated one first.
        plan: the kernel in a configuration, for the tensors of a run.

    Attributes:
        run: called with x and the plan's other arguments. After the first call it is the plan's own, which costs the
            host no more than that.
        plan: the chosen one; None before the first run.
    """

    __slots__ = ("_candidates", "_choices", "_key", "_make", "plan", "run")

    def __init__(
        self,
        choices: Choices[C],
        key: Hashable,
        candidates: Callable[[Tensor], Sequence[C]],
        plan: Callable[..., Plan],
    ) -> None:
        self._choices, self._key, self._candidates, self._make = choices, key, candidates, plan
        self.plan: Plan | None = None
        self.run: Callable[..., Any] = self._choose_and_run

    def _choose_and_run(self, x: Tensor, *others: Any) -> Any:
        plan = functools.cache(lambda configuration: self._make(configuration, x, *others))
        configuration = self._choices(
            self._key, x, lambda: self._candidates(x), lambda candidate: plan(candidate).run(x, *others)
        )
        self.plan = plan(configuration)
        self.run = self.plan.run
        return self.run(x, *others)


def kept() -> dict[Any, Any]:
    """A dictionary of what is prepared, by its key: emptied when an ``autotune`` begins, so that kernels choose anew.

    None stands for what has to be rearranged first. ``keep`` fills it.
    """
    prepared: dict[Any, Any] = {}
    at_the_start(prepared.clear)
    return prepared


def keep(prepared: dict[Any, Any], key: Hashable, value: V, most: int = 4096) -> V:
    """Keep the value under its key, and return it; what was kept goes once there are so many."""
    if len(prepared) >= most:
        prepared.clear()
    prepared[key] = value
    return value
