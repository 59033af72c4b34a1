"""A whole training step as one CUDA graph: one launch instead of a thousand.

SADP's batches have one shape, and nothing in a step waits for the host, so the forward pass, the loss, the backward
pass, the optimizer and the scores of the batch can be recorded once and replayed. A small network's step is bound by
the host's launches otherwise, and the scores' many small kernels cost more there than on the GPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .sadp import SADP

# Eager steps before anything is recorded: kernels compile, cuDNN chooses, the optimizer creates its state. Another kind
# of step then needs one: a kernel may be new to it, and compiling is not allowed while a graph is recorded.
_WARMUP_STEPS = 2

_Kind = tuple[bool, bool, int]  # weighted, scored, batch size


class _Recorded:
    """One recorded kind of step, with the tensors that a replay reads and writes."""

    def __init__(
        self, graph: torch.cuda.CUDAGraph, index: Tensor, weights: Tensor | None, loss: Tensor, taps: object
    ) -> None:
        self.graph, self.index, self.weights, self.loss = graph, index, weights, loss
        self.taps = taps  # what the graph measures with: their memory must stay


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
        sadp._weigh_all = not sadp.passive

    def __call__(self, index: Tensor) -> Tensor:
        """The step's loss, 0-dim; the next call overwrites it."""
        with torch.cuda.device(self._sadp.device):
            return self._run(index)

    def _run(self, index: Tensor) -> Tensor:
        kind = self._sadp.batch_kind
        recorded = None if kind is None else self._recorded.get(kind)
        if recorded is not None:
            self._replay(recorded, index)
            return recorded.loss
        if kind is None or self._eager_steps[kind] == 0 or self._eager_steps.total() < _WARMUP_STEPS:
            self._eager_steps[kind] += 1
            return self._run_eagerly(index)
        self._recorded[kind] = recorded = self._record(index)
        self._replay(recorded, index)
        return recorded.loss

    def _run_eagerly(self, index: Tensor) -> Tensor:
        index, _ = self._own_batch(index)
        # On a side stream, as recording does it: autograd remembers the stream that a parameter was first used on.
        current = torch.cuda.current_stream()
        self._side_stream.wait_stream(current)
        with torch.cuda.stream(self._side_stream):
            loss = self._step(index)
            self._sadp.collect()
        current.wait_stream(self._side_stream)
        return loss

    def _record(self, index: Tensor) -> _Recorded:
        """Record the step on the batch at hand; recording runs nothing."""
        static_index, static_weights = self._own_batch(index)
        graph = torch.cuda.CUDAGraph()
        for generator in self._generators:
            graph.register_generator_state(generator)
        # Entering gives the eager steps' free memory back (torch.cuda.empty_cache).
        with torch.cuda.graph(graph, pool=self._pool, stream=self._side_stream):
            loss = self._step(static_index)
            self._sadp.collect()
        batch = self._sadp._batch
        assert batch is not None
        return _Recorded(graph, static_index, static_weights, loss, batch.taps)

    def _own_batch(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give the batch at hand an index and weights of its own, rather than rows of the epoch's.

        A graph reads its batch there, and addresses are aligned as they will be in it: kernels compile before.
        """
        batch = self._sadp._batch
        assert batch is not None
        batch.indices = index.clone()
        batch.weights = None if batch.weights is None else batch.weights.clone()
        return batch.indices, batch.weights

    def _replay(self, recorded: _Recorded, index: Tensor) -> None:
        batch = self._sadp._batch
        assert batch is not None
        if batch.indices is not recorded.index:  # else this batch was just recorded
            recorded.index.copy_(index)
            if recorded.weights is not None and batch.weights is not None:
                recorded.weights.copy_(batch.weights)
        recorded.graph.replay()
        self._sadp._close(batch)
