"""A whole training step as one CUDA graph: one launch instead of a thousand.

SADP's batches have one shape, and nothing in a step waits for the host, so the forward pass, the loss, the backward
pass, the optimizer and the scores of the batch can be recorded once and replayed. A small network's step is bound by
the host's launches otherwise, and the scores' many small kernels cost more there than on the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch import Batch
from .sadp import SADP

# Eager steps before anything is recorded: kernels compile, cuDNN chooses, the optimizer creates its state. Another kind
# of step then needs one: a kernel may be new to it, and compiling is not allowed while a graph is recorded.
_WARMUP_STEPS = 2

_Kind = tuple[bool, bool, int]  # weighted, scored, batch size


class _Recorded(NamedTuple):
    """One recorded kind of step."""

    graph: torch.cuda.CUDAGraph
    batch: Batch  # it was recorded on: a replay reads its index and weights, and measures with its taps
    loss: Tensor


class GraphedStep:
    """``step(index) -> loss`` of a loop over ``sadp.batches(...)``, recorded as a CUDA graph and replayed::

        step = GraphedStep(step, sadp)
        for index in sadp.batches(128):
            loss = step(index)

    The first steps run eagerly; then one graph is recorded for batches that are scored and, if training ends with
    epochs that need no scores, one for those. Graphs share their memory, and that of the eager steps is given back
    before: the peak is that of one step. The example weights are part of the graph also where all are 1, so a step's
    loss may differ from an eager one's in its last bits.

    What must hold, as for any CUDA graph: every step runs the same operations on tensors of the same shapes; nothing in
    it waits for the host (no ``.item()``, no GradScaler, which skips steps); whatever changes from step to step is a
    tensor on the device that is updated in place, learning rates too (``lr=torch.tensor(...)``, and ``capturable=True``
    where the optimizer has it); parameters and optimizer state are not replaced by other tensors once it is recorded.
    DistributedDataParallel in a graph has conditions of its own (see PyTorch's notes on CUDA graphs) and was not tried.

    Args:
        step: one training step on the examples ``index`` (int64 [B], CUDA): ``zero_grad(set_to_none=True)``, forward,
            ``sadp.loss``, reset, backward, optimizer; returns the loss, detached. This order takes the least memory:
            no gradient lies beside the activations, and no neuron keeps its input until after the backward pass.
        sadp: whose batches are trained on.
        generators: CUDA random generators that the step draws from, other than torch's default one.

    Raises:
        ValueError: sadp is not on a CUDA device.
    """

    def __init__(
        self, step: Callable[[Tensor], Tensor], sadp: SADP, generators: Sequence[torch.Generator] = ()
    ) -> None:
        if sadp.device.type != "cuda":
            raise ValueError(f"GraphedStep needs a CUDA GPU, but this SADP is on {sadp.device}: call the step itself")
        self._step, self._sadp, self._generators = step, sadp, generators
        self._eager_steps: Counter[_Kind | None] = Counter()
        self._recorded: dict[_Kind, _Recorded] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._side_stream = torch.cuda.Stream(sadp.device)
        sadp.weigh_all()

    def __call__(self, index: Tensor) -> Tensor:
        """The step's loss, 0-dim; the next call overwrites it."""
        with torch.cuda.device(self._sadp.device):
            return self._run(index)

    def _run(self, index: Tensor) -> Tensor:
        batch = self._sadp.batch
        if batch is None:
            raise RuntimeError("a GraphedStep belongs inside a loop over the batches of its SADP: call it there")
        kind = batch.kind
        if kind is None or kind not in self._recorded:
            batch.own(index)
            if kind is None or self._eager_steps[kind] == 0 or self._eager_steps.total() < _WARMUP_STEPS:
                self._eager_steps[kind] += 1
                return self._run_eagerly(batch)
            self._recorded[kind] = self._record(batch)
        recorded = self._recorded[kind]
        self._replay(recorded, batch, index)
        return recorded.loss

    def _run_eagerly(self, batch: Batch) -> Tensor:
        # On a side stream, as recording does it: autograd remembers the stream that a parameter was first used on.
        current = torch.cuda.current_stream()
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            loss = self._step(batch.indices)
            batch.collect()
        current.wait_stream(self._side_stream)
        return loss

    def _record(self, batch: Batch) -> _Recorded:
        """Record the step on the batch at hand; recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Entering gives the eager steps' free memory back (torch.cuda.empty_cache).
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream):
            loss = self._step(batch.indices)
            batch.collect()
        return _Recorded(graph, batch, loss)

    def _replay(self, recorded: _Recorded, batch: Batch, index: Tensor) -> None:
        if batch is not recorded.batch:  # else it was just recorded
            recorded.batch.indices.copy_(index)
            if recorded.batch.weights is not None and batch.weights is not None:
                recorded.batch.weights.copy_(batch.weights)
        recorded.graph.replay()
        batch.close()
