"""The kernels for images and for packed spikes as they reach a GPU: compiled without one, 16-byte accesses, no spills.

Run as a script, this file prints what came out.
"""

import functools
import json

import pytest
import torch

ARCHITECTURE = 90


def compile_launch(launch, tensors):
    """Compile what a ``Launch`` launches with these tensors, specialised as Triton specialises it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {
        torch.float32: "fp32",
        torch.float16: "fp16",
        torch.bfloat16: "bf16",
        torch.uint8: "u8",
        torch.int64: "i64",
    }
    options = {k: v for k, v in launch._constants.items() if k in ("num_warps", "enable_fp_fusion")}
    constants = {k: v for k, v in launch._constants.items() if k not in options}
    names = launch._kernel.arg_names
    values = [*tensors, *launch._numbers]
    signature = {
        name: f"*{kinds[value.dtype]}" if isinstance(value, torch.Tensor) else "i32"
        for name, value in zip(names, values)
    }
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [i for i, value in enumerate(values) if isinstance(value, torch.Tensor) or value % 16 == 0]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(launch._kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURE, 32), options=options)


def report() -> dict:
    from test_compile import local_memory, memory_accesses

    from sadp_fast.ops.augment import op as augment
    from sadp_fast.ops.spike_bits import op as spike_bits

    found = {}

    def add(key, module, call):
        class Recorded(module.Launch):
            def __call__(self, *tensors):
                compiled = compile_launch(self, tensors)
                found[f"{key} {self._kernel.__name__}"] = {
                    "accesses": memory_accesses(compiled.asm["ptx"]),
                    "local": local_memory(compiled.asm["cubin"]),
                }

        module._launch.cache_clear()
        original, module.Launch = module.Launch, Recorded
        call()
        module.Launch = original

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for greatest in (1, 3, 15):
            flat = torch.zeros(1 << 14, dtype=dtype)
            buffer = torch.zeros(spike_bits.buffer_bytes(len(flat), greatest), dtype=torch.uint8)
            key = f"{dtype} {greatest}"
            add(key, spike_bits, functools.partial(spike_bits.pack, flat, greatest))
            add(key, spike_bits, functools.partial(spike_bits.unpack, buffer, len(flat), greatest, dtype))
        images, index, draws, mean, std = (
            torch.zeros(100, 3, 32, 32, dtype=torch.uint8),
            torch.zeros(16, dtype=torch.int64),
            torch.zeros(5, 16),
            torch.zeros(3),
            torch.ones(3),
        )
        for layout in (torch.contiguous_format, torch.channels_last):
            for chosen, random, cutout in ((index, draws[:3], 0), (None, None, 0), (index, draws, 16)):
                arguments = (images, chosen, random, mean, std, 4, cutout, dtype, layout)
                key = f"{dtype} {layout} {chosen is None} {cutout}"
                add(key, augment, functools.partial(augment.crop_flip_normalise, *arguments))
    return found


@pytest.fixture
def compiled(compiled_report):
    return compiled_report(__file__)


def test_everything_compiles_without_spills(compiled):
    assert len(compiled) == 9 * 2 + 3 * 6
    for key, result in compiled.items():
        assert result["local"] in (0, None), key


def test_dense_values_move_sixteen_bytes_at_a_time(compiled):
    for key, result in compiled.items():
        accesses = result["accesses"]
        if " pack_kernel" in key:
            assert set(accesses) == {"ld 16", "st 4", "st 1"} and accesses["st 1"] == 1, key
        elif " unpack_kernel" in key:
            assert set(accesses) == {"ld 4", "ld 1", "st 16"} and accesses["ld 1"] == 1, key
        else:
            assert {kind for kind in accesses if kind.startswith("st")} == {"st 16"}, key


def test_cutout_reads_two_draws_more_and_no_more_of_the_images(compiled):
    cut = [key for key in compiled if " 16 crop_flip" in key]
    assert len(cut) == 6
    for key in cut:
        accesses, plain = (compiled[k]["accesses"] for k in (key, key.replace(" 16 crop", " 0 crop")))
        assert accesses == {**plain, "ld 4": plain["ld 4"] + 2} and plain["ld 1"] > 0, key


if __name__ == "__main__":
    print(json.dumps(report()))
