"""A labelled data set in memory, and the checks that every source of one shares."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DataError(RuntimeError):
    """A data set cannot be read; the message is one sentence that says what, where and the remedy."""


@dataclass(frozen=True)
class Dataset:
    """A labelled data set in memory.

    Images are uint8 [N, C, H, W], or event frames uint8 [N, T, C, H, W]; labels are int64 [N]. `mean` and `std`
    (float32 [C], in units of the raw uint8 values) normalise an image: (x - mean) / std in each channel; event frames
    are only scaled, so that an empty pixel stays 0. `augmented` says whether training images are to be cropped and
    flipped at random.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    augmented: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one example: (C, H, W), or (T, C, H, W) for event frames."""
        return tuple(self.train_images.shape[1:])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """By what runs of one data set know each other: "name", "train_examples", and "labels", a digest.

        Of an example's shape, the number of classes and all labels in their order, but of no pixels: decoders of JPEG
        files differ by a bit.
        """
        digest = hashlib.sha256(repr((self.shape, self.num_classes, len(self.train_labels))).encode())
        for labels in (self.train_labels, self.test_labels):
            digest.update(labels.cpu().numpy().astype("<i8").tobytes())
        return {"name": self.name, "train_examples": len(self.train_labels), "labels": digest.hexdigest()[:10]}

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with every tensor on `device`."""
        tensors: dict[str, Any] = {k: value.to(device) for k, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two identities are of different data sets, by what both know."""
    return any(one[key] != other[key] for key in one.keys() & other.keys())


def described(identity: dict[str, Any]) -> str:
    """An identity as errors name it."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in identity.items())


def from_arrays(name: str, arrays: Sequence[np.ndarray], num_classes: int, where: Path) -> Dataset:
    """NHW, NHWC or NTCHW arrays of images with their labels as tensors, channels before pixels; raises DataError."""
    train_x, train_y, test_x, test_y = arrays
    for split, images, labels in (("train", train_x, train_y), ("test", test_x, test_y)):
        if problem := _problem(images, labels, train_x, num_classes):
            raise DataError(f"{where}: {split} {problem}")
    train_images, test_images = (_channels_first(images) for images in (train_x, test_x))
    # Drawn at random, since files are often ordered by class in a way that a stride would follow.
    count = min(10_000, 1 + 2**28 // train_images[0].numel())  # at most 2 GiB of float64
    drawn = torch.randperm(len(train_images), generator=torch.Generator().manual_seed(0))[:count]
    sample = train_images[drawn].double()
    std, mean = torch.std_mean(sample, dim=[axis for axis in range(sample.ndim) if axis != sample.ndim - 3])
    return Dataset(
        name=name,
        train_images=train_images,
        train_labels=torch.from_numpy(train_y.astype(np.int64)),
        test_images=test_images,
        test_labels=torch.from_numpy(test_y.astype(np.int64)),
        num_classes=num_classes,
        mean=mean.float() if sample.ndim == 4 else torch.zeros(len(mean)),
        std=std.float().clamp_min(1e-3),
        augmented=sample.ndim == 4 and sample.shape[1] == 3,
    )


def _problem(images: np.ndarray, labels: np.ndarray, train: np.ndarray, num_classes: int) -> str | None:
    """What is wrong with a split's arrays, beside the training images."""
    are = f"images of shape {images.shape}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4, 5):
        return f"images are {images.dtype} of shape {images.shape}: they must be uint8 of shape NHW, NHWC or NTCHW"
    if images.ndim == 4 and images.shape[1] <= 4 < min(images.shape[2:]):
        return f"{are} look like NCHW, but NHWC is expected: store x.transpose(0, 2, 3, 1)"
    if not images.size or images.shape[1:] != train.shape[1:]:
        return f"{are} beside train images of shape {train.shape}: both need examples of one common shape"
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        found = f"{labels.dtype} of shape {labels.shape}"
        return f"labels are {found} for {len(images)} images: they must be one integer an image"
    if labels.min() < 0 or labels.max() >= num_classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        return f"labels hold {wrong}, out of range: classes are 0 to {num_classes - 1}"
    return None


def _channels_first(images: np.ndarray) -> Tensor:
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4:
        images = images.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(images, requirements=["C", "W"]))
