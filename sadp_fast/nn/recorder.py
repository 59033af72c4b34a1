"""What a neuron's calls measure, by example: the recorder that is handed in, and the record of one call.

``node.recorder`` is None, and nothing is measured, or a ``Recorder``. At each call the node asks it what to measure
(``Recorder.begin``); the kernels then write into memory of that call (``Call``), which is read whenever one likes.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# Numbers [T, N] that a compiled call can leave before an uncompiled one has shown its shape: 256 KiB a neuron.
COMPILED_CAPACITY = 1 << 16


class Energies(NamedTuple):
    """Squared norms of one call of a BatchNorm node, per example and summed over its steps, float32 [N].

    ``output`` is that of the output (the number of spikes, where no residual was added), ``delta`` that of the loss
    gradient in front of the normalisation, the normalisation's statistics held constant. Both are there after the
    backward pass, and ``delta`` is NaN before.
    """

    output: Tensor
    delta: Tensor


class Call:
    """What one forward call of a node and its backward pass measure.

    Args:
        shape: [T, N, *] of the output; T = 1 for a single step.
        step_mode: of the node.
        device: of the input.

    Attributes, which ``Recorder.begin`` sets:
        counts: whether spikes are counted.
        by_step: of a BatchNorm node, whether its gradient's norms are taken by step, by another variant of it.
        wants_energies: of a BatchNorm node, whether its ``energies`` are needed although the norms are by step.
        channel_scale: None, or [C]: the norms are those of the gradient times this scale along the channel dimension
            (dimension 1 of one step's input). With gamma/sigma of a normalisation in front of the neuron, they are
            those of the gradient in front of that normalisation.
        memory: flat float32 that outlives a call under torch.compile, whose backward pass can only write into such.

    Attributes, which others set:
        shared: whether several recorders measure this call.
        awaits_norms: whether there may be a backward pass.
        spikes: int32, counts [T, N] or partial sums of them [N, programs, T].
    """

    counts = by_step = wants_energies = shared = False
    channel_scale: Tensor | None = None
    memory: Tensor | None = None
    spikes: Tensor | None = None
    _norms: Tensor | None = None  # float32, partial sums [N, programs, T]
    _buffer: Tensor | None = None
    _holds_energies = False  # whether the buffer does, rather than norms by step
    _rows: Energies | None = None

    def __init__(self, shape: tuple[int, ...], step_mode: str, device: torch.device) -> None:
        self.shape, self.step_mode, self.device = shape, step_mode, device
        self.awaits_norms = torch.is_grad_enabled()

    @property
    def examples(self) -> int:
        """N."""
        return self.shape[1]

    # ------------------------------------------------------------------------------------- what the passes write into

    def norms_buffer(self) -> Tensor:
        """float32 [T, N], NaN, for the backward pass to write its squared norms into."""
        return self._nan(energies=False)

    def record_norms(self, sums: Tensor) -> None:
        """Take the backward pass's squared norms as partial sums, float32 [N, programs, T], in the buffer's place."""
        self._norms = sums

    def energy_rows(self) -> Energies:
        """Two float32 [N] for the passes of a BatchNorm node to write into: those handed in, or NaN."""
        if self._rows is None:
            if self.memory is not None or torch.compiler.is_compiling():
                return Energies(*self._nan(energies=True))
            self._rows = Energies(*torch.full((2, self.examples), torch.nan, device=self.device))
        return self._rows

    def write_energies_into(self, output: Tensor, delta: Tensor) -> None:
        """Hand in the rows of ``Energies``.

        Raises:
            ValueError: one is not float32 [N], contiguous, on the call's device.
        """
        wanted = (self.examples,), torch.float32, self.device, True
        found = [(tuple(row.shape), row.dtype, row.device, row.is_contiguous()) for row in (output, delta)]
        if found != [wanted, wanted]:
            raise ValueError(
                f"energies must be written into two contiguous float32 tensors [N] on {self.device} with "
                f"N = {self.examples} examples, got (shape, dtype, device, contiguous) {found}; hand in rows for this "
                "batch"
            )
        self._rows = Energies(output, delta)

    def _nan(self, energies: bool) -> Tensor:
        self._holds_energies = energies
        shape = self._buffer_shape
        if self.memory is not None:
            self._buffer = self.memory  # no view: a compiled graph cannot return one of what its backward pass changes
            return self.memory[: shape[0] * shape[1]].view(shape).fill_(torch.nan)
        if torch.compiler.is_compiling():
            raise RuntimeError("under torch.compile a recorder has to hand in call.memory: see CallRecorder")
        self._buffer = torch.full(shape, torch.nan, device=self.device)
        return self._buffer

    @property
    def _buffer_shape(self) -> tuple[int, int]:
        return 2 if self._holds_energies else self.shape[0], self.examples

    # ---------------------------------------------------------------------------------------------- what can be read

    @property
    def has_norms(self) -> bool:
        """Whether a backward pass is known to have been; one that writes into a buffer does not say so."""
        return self._norms is not None

    @property
    def spike_count(self) -> Tensor | None:
        """int32 [T, N], known after the forward pass; None where ``counts`` is False."""
        return None if self.spikes is None else _added(self.spikes)

    @property
    def grad_norm_sq(self) -> Tensor | None:
        """float32 [T, N], or [1, N] of a BatchNorm node whose norms are not by step, but summed over the steps.

        NaN until the backward pass has been, None for a forward pass without gradients.
        """
        if self._norms is not None:
            return _added(self._norms)
        if self._buffer is not None and not self._holds_energies:
            return self._read_buffer()
        if not self.awaits_norms:
            return None
        if self._buffer is None and (self._rows is None or self.by_step):
            return torch.full((self.shape[0], self.examples), torch.nan, device=self.device)
        return self.energies.delta.unsqueeze(0)

    @property
    def energies(self) -> Energies:
        """Of a BatchNorm node that was called with gradients, not by step."""
        return Energies(*self._read_buffer()) if self._rows is None else self._rows

    def _read_buffer(self) -> Tensor:
        assert self._buffer is not None
        steps, examples = self._buffer_shape
        found = self._buffer.view(-1)[: steps * examples].view(steps, examples)
        return found if self.memory is None else found.clone()  # the next compiled call writes into the same memory


def _added(sums: Tensor) -> Tensor:
    """[T, N] from itself or from partial sums [N, programs, T], added in a fixed order."""
    if sums.ndim == 2:
        return sums
    return (sums.squeeze(1) if sums.shape[1] == 1 else sums.sum(1, dtype=sums.dtype)).t()


class Recorder:
    """What measures the calls of one node. Subclass it, and ``hand_in`` an instance.

    A copy of the node does not get it, nor does a replica of DataParallel: they see other batches.
    """

    def begin(self, call: Call) -> bool:
        """A call of the node begins: say in ``call`` what to measure, and keep it to read from.

        Returns:
            whether the call is measured at all.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """The node's state was reset: what has been measured stays until the next call."""


class CallRecorder(Recorder):
    """Spike counts and squared gradient norms of a node, by example and step.

    They are those of the last call ('m'), or of all single steps since the last reset ('s'). ``reset`` of the node
    does not forget them: the next call does.

    Args:
        by_step: of a BatchNorm node, whether its gradient's norms are taken by step. It then runs as two operators,
            torch's batch normalisation and the neuron, in the place of one.
        device: where to keep memory that compiled calls can write into from the first one on; None waits for an
            uncompiled call.

    Attributes:
        calls: what was measured; ``Call`` says how it is read.
    """

    def __init__(self, by_step: bool = False, device: torch.device | None = None) -> None:
        self.by_step = by_step
        self.calls: list[Call] = []
        self._is_over = False
        self._memory = None if device is None else torch.empty(COMPILED_CAPACITY, device=device)

    def begin(self, call: Call) -> bool:
        call.counts = True
        call.by_step |= self.by_step
        earlier = self.calls if call.step_mode == "s" and not self._is_over else []
        if earlier and earlier[-1].examples != call.examples:
            earlier = []  # another batch: v and v_seq start anew, too
        needed = max(call.shape[0], 2) * call.examples
        memory = self._memory
        fits = memory is not None and memory.numel() >= needed and memory.device == call.device
        if not torch.compiler.is_compiling():
            if _recomputes(self.calls):
                return True  # measured the first time
            if not fits:  # for later calls under torch.compile, which cannot make any
                self._memory = torch.empty(needed, device=call.device)
        elif call.awaits_norms:
            if not fits:
                raise RuntimeError(
                    "collect_statistics under torch.compile writes into an existing buffer: run one forward pass with "
                    f"this [T, N] = {tuple(call.shape[:2])} uncompiled first, or use sadp_fast.record(model)"
                )
            if any(one.memory is not None for one in earlier):
                raise RuntimeError(
                    "collect_statistics under torch.compile has one buffer, which an earlier call since the last reset "
                    "writes its gradient norms into: take all steps in one call (step_mode='m'), or run uncompiled"
                )
            call.memory = memory
        self.calls, self._is_over = [*earlier, call], False
        return True

    def reset(self) -> None:
        self._is_over = True

    @property
    def spike_count(self) -> Tensor | None:
        """Spikes of each example at each step, int32 [T, N]; None before the first call."""
        return _joined([call.spike_count for call in self.calls])

    @property
    def grad_norm_sq(self) -> Tensor | None:
        """Squared L2 norm of the loss gradient for each example's input current at each step, float32 [T, N].

        The same steps as ``spike_count``; NaN where the backward pass has not come by yet, None where there is none.
        Of a BatchNorm node it is the gradient in front of the normalisation, whose statistics are held constant; in
        step mode 'm' and without ``by_step`` it is summed over the steps, [1, N].
        """
        return _joined([call.grad_norm_sq for call in self.calls])

    @property
    def firing_rate(self) -> Tensor | None:
        """Share of an example's neurons and steps with a spike, float32 [N]; None before the first call."""
        count = self.spike_count
        return None if count is None else count.sum(0).float() / (self.places / max(1, count.shape[1]))

    @property
    def spikes(self) -> int:
        """All spikes together; waits for the device."""
        count = self.spike_count
        return 0 if count is None else int(count.sum())

    @property
    def places(self) -> int:
        """Neurons of all examples at all steps: how many spikes there could be."""
        return sum(math.prod(call.shape) for call in self.calls)


def _joined(values: list[Tensor | None]) -> Tensor | None:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    return known[0] if len(known) == 1 else torch.cat(known)


def _recomputes(calls: list[Call]) -> bool:
    """Whether the call that begins is an activation checkpoint's second one, within the first one's backward pass."""
    return bool(calls) and calls[-1].awaits_norms and torch._C._current_graph_task_id() != -1


class _Several(Recorder):
    """Recorders that measure the same calls."""

    def __init__(self, members: tuple[Recorder, ...]) -> None:
        self.members = members

    def begin(self, call: Call) -> bool:
        call.shared = True
        measured = [member.begin(call) for member in self.members]
        return any(measured)

    def reset(self) -> None:
        for member in self.members:
            member.reset()


class HasRecorder(Protocol):
    """A node, as far as recorders know it."""

    recorder: Recorder | None


def recorders_of(node: HasRecorder) -> tuple[Recorder, ...]:
    """All that measure a node's calls."""
    recorder = node.recorder
    return () if recorder is None else recorder.members if isinstance(recorder, _Several) else (recorder,)


def hand_in(node: HasRecorder, recorder: Recorder) -> None:
    """Let a recorder measure a node's calls, beside those that do already."""
    _set(node, (*recorders_of(node), recorder))


def take_back(node: HasRecorder, recorder: Recorder) -> None:
    """Undo ``hand_in``; the other recorders go on. Nothing happens where it was not handed in."""
    _set(node, tuple(other for other in recorders_of(node) if other is not recorder))


def _set(node: HasRecorder, members: tuple[Recorder, ...]) -> None:
    node.recorder = _Several(members) if len(members) > 1 else members[0] if members else None
