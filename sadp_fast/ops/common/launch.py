"""Launching Triton kernels at little cost to the host.

Triton works out at every launch which compiled kernel fits the arguments, which takes far longer than the launch
itself. A ``Launch`` fixes everything but the tensors; its first call goes through Triton, which compiles, and later
calls fill the tensors' addresses into parameters packed before (csrc/launch.cpp). Where that cannot be done (a driver
before CUDA 12.4, a Triton that lays parameters out in another way) every call goes through Triton.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...native import library
from .surrogate import INTERPRETED

_current_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)

_FORMATS = {"i32": "i", "u32": "I", "i64": "q", "u64": "Q", "fp32": "f"}


@triton.jit
def await_previous_kernel():
    """The first thing in a kernel of an early launch: waits for the kernel in front to end and its writes to be seen.

    Also lets the kernel behind come up, if it is one of an early launch, as soon as all programs of this one run.
    """
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 0 of another device, where kernels are interpreted and any grid is large enough."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0


def early_launch(device: torch.device) -> bool:
    """Whether a kernel that calls ``await_previous_kernel`` can be launched with ``launch_pdl``.

    Such a kernel comes up while the one in front of it on the stream ends (programmatic dependent launch), which hides
    a microsecond; needs compute capability 9.0.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _known_to_the_compiler(value: Any) -> Any:
    """A constant, or a NamedTuple of them: as Triton before 3.9 wants them, whose expressions take no bare numbers."""
    if INTERPRETED.value:
        return value
    if isinstance(value, tuple):
        return type(value)(*map(_known_to_the_compiler, value))
    return tl.constexpr(value)


class Launch:
    """One kernel with its grid, numbers and constants; calling it with the tensors launches it.

    Make one for every combination of what Triton compiles for, and keep it: shapes, strides, dtypes and the device of
    the tensors, and every number. The tensors' addresses may change from call to call, their alignment too.

    Args:
        kernel: a ``triton.jit`` function whose parameters are first tensors, then numbers, then constants.
        device: where the tensors are; on the CPU the kernel runs in Triton's interpreter.
        programs: length of the one-dimensional grid, at least 1.
        numbers: arguments (int or float) after the tensors, in the kernel's order.
        constants: compile-time constants, NamedTuples of them, and options (``num_warps``, ...) by name.
    """

    __slots__ = ("_constants", "_device", "_index", "_kernel", "_native", "_numbers", "_programs", "_variants")

    def __init__(
        self,
        kernel: Any,
        device: torch.device,
        programs: int,
        numbers: Sequence[int | float],
        constants: dict[str, Any],
    ) -> None:
        self._kernel, self._device, self._programs = kernel, device, programs
        bundles = {name: _known_to_the_compiler(value) for name, value in constants.items() if isinstance(value, tuple)}
        self._numbers, self._constants = tuple(numbers), constants | bundles
        self._index = device.index
        self._native: Callable[..., bool] | None = None
        self._variants: dict[int, Callable[..., bool]] = {}  # by which tensors are aligned to 16 bytes

    def __call__(self, *tensors: Tensor) -> None:
        native = self._native
        if native is None or not native(_current_stream(self._index), *tensors):  # type: ignore[misc]
            self._launch_other_variant(tensors)

    def _launch_other_variant(self, tensors: tuple[Tensor, ...]) -> None:
        """The first launch, one with tensors aligned in another way, or any that Triton has to do."""
        if self._device.type == "cpu":
            self._launch_by_triton(tensors)
            return
        aligned = sum((t.data_ptr() % 16 == 0) << i for i, t in enumerate(tensors))
        native = self._variants.get(aligned)
        if native is None:
            with torch.cuda.device(self._device):  # Triton launches on the current device
                native = self._prepared(self._launch_by_triton(tensors), len(tensors), aligned)
            if native is not None:
                self._native = self._variants[aligned] = native
        elif native(_current_stream(self._index), *tensors):  # type: ignore[misc]
            self._native = native

    def _launch_by_triton(self, tensors: tuple[Tensor, ...]) -> Any:
        return self._kernel[(self._programs,)](*tensors, *self._numbers, **self._constants)

    def _prepared(self, compiled: Any, tensors: int, aligned: int) -> Callable[..., bool] | None:
        """The native callable for what Triton compiled, or None where it cannot be launched that way."""
        if _current_stream is None:
            return None
        metadata = getattr(compiled, "metadata", None)
        signature = getattr(getattr(compiled, "src", None), "signature", None)
        special = ("launch_cooperative_grid", "global_scratch_size", "profile_scratch_size")
        if (
            metadata is None
            or not isinstance(signature, dict)
            or getattr(metadata, "num_ctas", None) != 1
            or any(getattr(metadata, name, 0) for name in special)
        ):
            return None
        values = [None] * tensors + list(self._numbers)
        parameters = []
        for name, value in zip(self._kernel.arg_names, values, strict=False):
            kind = signature.get(name, "constexpr")
            if value is None and kind.startswith("*"):
                parameters.append(bytes(8))
            elif value is not None and kind in _FORMATS:
                parameters.append(struct.pack(_FORMATS[kind], value))
            elif value is None or kind != "constexpr":  # numbers equal to 1 are compiled in
                return None
        return library.prepare_launch(
            compiled.function,
            self._programs,
            32 * metadata.num_warps,
            metadata.shared,
            bool(getattr(metadata, "launch_pdl", False)),
            aligned,
            tensors,
            parameters,
        )
