"""A DataLoader whose batches SADP draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from ..errors import name_of
from .batching import rank_and_world

if TYPE_CHECKING:
    from .sadp import SADP

# Taken over from the loader that SADP was given.
_LOADER_OPTIONS = (
    "num_workers",
    "collate_fn",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
)


class PrunedLoader:
    """A DataLoader's batches as SADP draws them: one iteration is one epoch. Made by ``SADP.loader``."""

    def __init__(self, sadp: SADP, loader: DataLoader) -> None:
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
        if size != sadp.num_examples:
            raise ValueError(
                f"loader has {size} examples, but SADP was built with num_examples={sadp.num_examples}: build it with "
                "len(train_set) of the same data set"
            )
        if not sadp.passive and type(loader).__iter__ is not DataLoader.__iter__:
            raise ValueError(
                f"loader is a {name_of(loader)} with an __iter__ of its own, which would not see the batches that SADP "
                "draws: pass a plain DataLoader, and do in its collate_fn or in the loop what that method does"
            )
        sampler = loader.sampler
        everything = isinstance(sampler, (SequentialSampler, DistributedSampler)) or (
            isinstance(sampler, RandomSampler) and not sampler.replacement and sampler.num_samples == size
        )
        if not sadp.passive and not everything:
            raise ValueError(
                f"loader has a {name_of(sampler)}, in whose place SADP draws: leave it out, and for a part of the "
                "data pass a torch.utils.data.Subset"
            )
        self.sadp = sadp
        self.loader = loader
        self.batch_size: int = loader.batch_size
        self._batches: list[list[int]] = []
        self._pruned = None if sadp.passive else self._with_own_batches()

    def _with_own_batches(self) -> DataLoader:
        options = {name: getattr(self.loader, name) for name in _LOADER_OPTIONS if hasattr(self.loader, name)}
        if not options.get("pin_memory_device"):
            options.pop("pin_memory_device", None)  # its mere presence warns in newer versions of torch
        return DataLoader(self.loader.dataset, batch_sampler=_Rows(self), **options)

    def __getattr__(self, name: str) -> Any:
        # What else one asks a DataLoader for: dataset, num_workers, drop_last, sampler, ...
        if "loader" in self.__dict__:
            return getattr(self.loader, name)
        raise AttributeError(name)

    def __iter__(self) -> Iterator[Any]:
        sadp = self.sadp
        sadp._check_epoch()
        if self._pruned is None:
            sampler = self.loader.sampler
            ranks = sampler.num_replicas if isinstance(sampler, DistributedSampler) else 1
            if isinstance(sampler, (RandomSampler, SequentialSampler)) and rank_and_world()[1] > 1:
                warnings.warn(
                    "with prune_ratio=0 each rank trains on what its own DataLoader yields, which here is all of the "
                    "data: give it a DistributedSampler",
                    stacklevel=2,
                )
            examples = len(sampler)  # type: ignore[arg-type]
            if ranks > 1:
                examples = min(examples * ranks, sadp.num_examples)  # what pads the ranks' shares counts once
            yield from sadp._unpruned_epoch(self.loader, self.batch_size * ranks, examples)
            return
        batches = sadp._draw(self.batch_size, pad=not self.loader.drop_last)
        self._batches = batches.indices.tolist()
        for _, batch in zip(sadp._epoch(batches), self._pruned, strict=True):
            yield batch

    def __len__(self) -> int:
        """Batches of the running epoch; between epochs, those expected of the next. The number varies by epoch."""
        sadp = self.sadp
        if self._pruned is None:
            return len(self.loader)
        if sadp.running or sadp.epoch >= len(sadp.ratios):
            return len(self._batches)
        return sadp._expected_batches(self.batch_size, drop_last=self.loader.drop_last)


class _Rows:
    """The batch sampler behind a PrunedLoader: the drawn batches, as lists of indices."""

    def __init__(self, owner: PrunedLoader) -> None:
        self._owner = owner

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._owner._batches)

    def __len__(self) -> int:
        return len(self._owner._batches)
