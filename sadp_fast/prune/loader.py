"""A DataLoader whose batches are drawn elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from inspect import signature
from typing import Any, Protocol

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from ..errors import name_of
from .batch import Batch
from .batching import rank_and_world
from .epoch import DrawnEpoch

_CHOOSING = {"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"}
# The options that are taken over from the loader that is given: all but those that choose examples.
_TAKEN_OVER = signature(DataLoader).parameters.keys() - _CHOOSING


class EpochSource(Protocol):
    """What draws a PrunedLoader's epochs; SADP is one, whose docstrings say what each method does.

    Attributes:
        num_examples: N, size of the data set.
        passive: whether nothing is drawn: the loader's own batches are followed.
    """

    num_examples: int

    @property
    def passive(self) -> bool: ...
    def open_epoch(self, batch_size: int, *, pad: bool) -> DrawnEpoch: ...
    def train(self, epoch: DrawnEpoch) -> Iterator[Batch]: ...
    def follow(self, batches: Iterable[Any], batch_size: int, examples: int) -> Iterator[Any]: ...
    def expected_batches(self, batch_size: int, *, pad: bool) -> int | None: ...


class PrunedLoader:
    """A DataLoader's batches as they are drawn: one iteration is one epoch. Made by ``SADP.loader``.

    Attributes:
        source: what draws them.
        loader: the DataLoader that was given.
        batch_size: of every batch.
        rows: the indices of each batch of the running or last epoch, always the same list.
    """

    def __init__(self, source: EpochSource, loader: DataLoader[Any]) -> None:
        _check(loader, source.num_examples)
        self.source = source
        self.loader = loader
        self.batch_size: int = loader.batch_size  # type: ignore[assignment]
        self.rows: list[list[int]] = []
        self._pruned: DataLoader[Any] | None = None
        if not source.passive:
            _check_replaceable(loader)
            options = {name: getattr(loader, name) for name in _TAKEN_OVER}
            if not options.get("pin_memory_device"):
                options.pop("pin_memory_device", None)  # its mere presence warns
            self._pruned = DataLoader(loader.dataset, batch_sampler=self.rows, **options)

    def __getattr__(self, name: str) -> Any:
        # What else one asks a DataLoader for: dataset, num_workers, drop_last, sampler, ...
        if "loader" in self.__dict__:
            return getattr(self.loader, name)
        raise AttributeError(name)

    def __iter__(self) -> Iterator[Any]:
        if self._pruned is None:
            yield from self._unpruned()
            return
        epoch = self.source.open_epoch(self.batch_size, pad=not self.loader.drop_last)
        self.rows[:] = epoch.indices.tolist()
        for _, batch in zip(self.source.train(epoch), self._pruned, strict=True):
            yield batch

    def _unpruned(self) -> Iterator[Any]:
        sampler = self.loader.sampler
        ranks = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1
        if isinstance(sampler, (RandomSampler, SequentialSampler)) and rank_and_world()[1] > 1:
            warnings.warn(
                "with prune_ratio=0 each rank trains on what its own DataLoader yields, which here is all of the "
                "data: give it a DistributedSampler",
                stacklevel=3,
            )
        examples = len(sampler)  # type: ignore[arg-type]
        if ranks > 1:
            examples = min(examples * ranks, self.source.num_examples)  # what pads the ranks' shares counts once
        return self.source.follow(self.loader, self.batch_size * ranks, examples)

    def __len__(self) -> int:
        """Batches of the running epoch; between epochs, those expected of the next. The number varies by epoch."""
        if self._pruned is None:
            return len(self.loader)
        expected = self.source.expected_batches(self.batch_size, pad=not self.loader.drop_last)
        return len(self.rows) if expected is None else expected


def _check(loader: DataLoader[Any], num_examples: int) -> None:
    """Raise unless it is a DataLoader of batches of so many examples, which have indices."""
    if not isinstance(loader, DataLoader):
        raise TypeError(f"loader must be a torch DataLoader, got {name_of(loader)}: pass DataLoader(data_set, ...)")
    if isinstance(loader.dataset, IterableDataset):
        raise ValueError("loader must have a map-style data set: SADP draws examples by index, a stream has none")
    if loader.batch_size is None:
        raise ValueError(
            "loader must have a batch_size: SADP cuts the batches itself, so pass DataLoader(data_set, "
            "batch_size=...) without a batch_sampler"
        )
    size = len(loader.dataset)  # type: ignore[arg-type]
    if size != num_examples:
        raise ValueError(
            f"loader has {size} examples, but SADP was built with num_examples={num_examples}: build it with "
            "len(train_set) of the same data set"
        )


def _check_replaceable(loader: DataLoader[Any]) -> None:
    """Raise where other batches than the loader's own would lose something that it does."""
    if type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"loader is a {name_of(loader)} with an __iter__ of its own, which would not see the batches that SADP "
            "draws: pass a plain DataLoader, and do in its collate_fn or in the loop what that method does"
        )
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        everything = not sampler.replacement and sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    else:
        everything = isinstance(sampler, (SequentialSampler, DistributedSampler))
    if not everything:
        raise ValueError(
            f"loader has a {name_of(sampler)}, in whose place SADP draws: leave it out, and for a part of the "
            "data pass a torch.utils.data.Subset"
        )
