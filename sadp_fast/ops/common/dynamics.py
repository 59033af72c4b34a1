"""The constants of a neuron, shared by the reference and by the kernels."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dynamics:
    """Constants of a leaky (or, with ``tau=None``, perfect) integrate-and-fire neuron.

    Attributes:
        tau: membrane time constant in time steps (> 1); ``None`` for an IF neuron, which does not leak. Where it is
            learned, its initial value: the present 1 / tau is a tensor, which goes beside these constants.
        decay_input: whether the input current is divided by ``tau`` too.
        v_threshold: membrane potential at and above which the neuron fires.
        v_reset: potential after a spike (hard reset); ``None`` subtracts ``v_threshold`` instead (soft reset).
        detach_reset: whether the reset is left out of the backward pass.
        learned_tau: whether tau is a parameter (PLIF).
    """

    tau: float | None
    decay_input: bool
    v_threshold: float
    v_reset: float | None
    detach_reset: bool
    learned_tau: bool = False

    @property
    def constant_tau(self) -> float | None:
        """tau, unless it is learned or there is none."""
        return None if self.learned_tau else self.tau

    def check_reciprocal_tau(self, given: bool) -> None:
        """Raises ValueError unless 1 / tau is given where it is learned, and only there."""
        if given != self.learned_tau:
            raise ValueError(
                f"reciprocal_tau must be given if and only if tau is learned, got {'one' if given else 'none'} for "
                f"learned_tau={self.learned_tau}; pass the present 1 / tau with it, and nothing without"
            )

    @property
    def v_rest(self) -> float:
        """Potential that the membrane leaks towards, and starts from."""
        return 0.0 if self.v_reset is None else self.v_reset
