"""The BatchNorm + LIF kernels as they reach a GPU: compiled without one, wide accesses, nothing spilled.

Run as a script with a compute capability and ``usual`` or ``rare`` (what only slow tests ask about), this file prints
what came out. What is compiled is what a call on a GPU would launch: the launches are recorded, not run.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ARCHITECTURES = (80, 90, 100)
STEPS = (4, 8, 16)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYOUTS = ("channels_last", "contiguous")
PROCESSORS = 132
VARIANTS = 17
CANDIDATES = 5  # what autotune measures beside the curated configuration of each kernel


# ------------------------------------------------------------------------------- the script: compile without a GPU


def compile_launch(launch, tensors, architecture):
    """Compile what a ``Launch`` launches with these tensors, specialised as Triton specialises it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64"}
    option_names = ("num_warps", "maxnreg", "enable_fp_fusion", "launch_pdl")
    options = {name: value for name, value in launch._constants.items() if name in option_names}
    constants = {name: value for name, value in launch._constants.items() if name not in option_names}
    signature, aligned = {}, []
    values = [*tensors, *launch._numbers]
    unspecialised = {p.name for p in launch._kernel.params if p.do_not_specialize}
    unaligned = {p.name for p in launch._kernel.params if p.do_not_specialize_on_alignment}
    for i, (name, value) in enumerate(zip(launch._kernel.arg_names, values)):
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{kinds[value.dtype]}"
            aligned += [i] * (name not in unaligned)
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if name not in unspecialised:
                assert value != 1, name  # would be a constant
                aligned += [i] * (value % 16 == 0)
        else:
            signature[name] = "fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(launch._kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def registers(cubin: bytes) -> int | None:
    """Registers of a thread."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"REG:(\d+)", text))


class Compiler:
    """Stands in for the launches of one architecture, compiles each once and keeps what was asked about it."""

    def __init__(self, architecture: int):
        from sadp_fast.ops.batch_norm_lif import configuration, launch

        self.architecture, self.launch, self.found, self.key = architecture, launch, {}, ""
        configuration.multiprocessors = lambda device: PROCESSORS
        compiler = self

        class Recorded(launch.Launch):
            def __call__(self, *tensors):
                compiler.compile(self, tensors)

        launch.Launch = Recorded

    def compile(self, launch, tensors):
        from test_compile import local_memory, memory_accesses

        constants = launch._constants
        name = launch._kernel.__name__.removeprefix("norm_").removesuffix("_kernel")
        cut = getattr(constants["HOW"], "cut", None)
        if name == "backward":
            does = constants["HOW"].does
            name += " sums" * does.sums.value + " gradient" * does.write.value
        compiled = compile_launch(launch, tensors, self.architecture)
        cubin = compiled.asm["cubin"]
        self.found[f"{name} {self.key}"] = {
            "accesses": memory_accesses(compiled.asm["ptx"]),
            "local": local_memory(cubin),
            "registers": registers(cubin),
            "most registers": constants.get("maxnreg"),
            "elements": cut and cut.rows.value * cut.columns.value // 32 // constants["num_warps"],
            "masked": cut and cut.masked.value,
        }

    def step(self, key, shape, dtype, layout, d, index, *, residual, training=True, affine=True, **options):
        """All kernels of one training step."""
        from sadp_fast.ops.batch_norm_lif.op import batch_norm_lif

        launch, self.key, repeat = self.launch, key, options.get("repeat")
        launch._layers.clear()  # made for other configurations
        steps, examples, channels, *pixels = shape
        x = torch.empty(steps, examples, *pixels, channels, dtype=dtype).movedim(-1, 2)
        x = x if layout == "channels_last" else torch.empty(shape, dtype=dtype)
        if repeat is not None:
            x = x[0]
        per_channel = [torch.empty(channels) for _ in range(4)]
        parameters = [t.requires_grad_() if affine else None for t in per_channel[:2]]
        count = torch.zeros((), dtype=torch.int64)
        norm = launch.Normalisation(1e-5, 0.1, *per_channel[2:], count, use_batch=training, update=training)
        energies = (torch.empty(examples), torch.empty(examples))
        out_shape = x.shape if repeat is None else (repeat, *x.shape)
        other = torch.empty_strided(out_shape, x.expand(out_shape).stride(), dtype=dtype) if repeat is None else None
        reciprocal_tau = torch.empty((), requires_grad=True) if d.learned_tau else None
        out, _ = batch_norm_lif(
            x.requires_grad_(),
            other if residual else None,
            *parameters,
            norm,
            d,
            index,
            2.0,
            reciprocal_tau=reciprocal_tau,
            energies=energies,
            **options,
        )
        wanted = [x] if reciprocal_tau is None else [x, reciprocal_tau]
        torch.autograd.grad(out, wanted, torch.empty_strided(out.shape, out.stride(), dtype=dtype))


def rare(architecture: int, steps: int) -> bool:
    """Whether only slow tests ask: most layers have few steps, and the architectures differ little."""
    return architecture != 90 or steps != STEPS[0]


def compile_for(architecture: int, part: str) -> dict:
    from sadp_fast.ops.batch_norm_lif import configuration
    from sadp_fast.ops.common.dynamics import Dynamics
    from sadp_fast.surrogate import FUSED

    lif = Dynamics(2.0, True, 1.0, 0.0, False)
    compiler = Compiler(architecture)
    for steps in STEPS if architecture == 90 else STEPS[:1]:
        for name, dtype in DTYPES.items():
            for layout in LAYOUTS if architecture == 90 else LAYOUTS[:1]:
                if rare(architecture, steps) != (part == "rare"):
                    continue
                shape = (steps, 16, 64, 32, 32)
                compiler.step(f"T={steps} {name} {layout}", shape, dtype, layout, lif, 0, residual=True)
        plif = Dynamics(2.0, True, 1.0, 0.0, False, True)
        shape = (steps, 16, 64, 32, 32)
        if part == "rare":
            compiler.step(f"learned T={steps}", shape, torch.bfloat16, LAYOUTS[0], plif, 0, residual=True)
    if architecture == 90 and part == "usual":
        # The interpreter does not check types: every branch of the kernels has to get through the compiler too.
        variants = [(lif, index, {}) for index in range(1, len(FUSED))]
        variants += [(Dynamics(None, False, 1.0, None, False), 0, {}), (Dynamics(3.0, False, 1.0, None, True), 0, {})]
        variants += [(Dynamics(3.0, True, 0.8, -0.2, True), 0, {"want_v": True})]
        variants += [(lif, 0, {"training": False}), (lif, 0, {"repeat": 2}), (lif, 0, {"repeat": 2, "training": False})]
        learned = [Dynamics(2.0, decay_input, 1.0, 0.0, False, True) for decay_input in (True, False)]
        variants += [(d, 0, options) for d in learned for options in ({}, {"training": False, "affine": False})]
        assert len(variants) == VARIANTS
        for number, (d, index, options) in enumerate(variants):
            for layout in LAYOUTS:
                shape = (2, 3, 30, 5, 3)
                key = f"variant {number} {layout}"
                compiler.step(key, shape, torch.float16, layout, d, index, residual=False, **options)
    if architecture == 90 and part == "rare":
        tuning = dict(configuration.TUNING)
        for number in range(CANDIDATES):
            configuration.TUNING.update({kernel: (found[1 + number],) for kernel, found in tuning.items()})
            shape = (4, 16, 64, 32, 32)
            compiler.step(f"candidate {number}", shape, torch.bfloat16, "channels_last", lif, 0, residual=True)
    return compiler.found


# ---------------------------------------------------------------------------------------- compiled for a real GPU


@pytest.fixture
def compiled_for(compiled_report):
    return lambda architecture, part: compiled_report(__file__, architecture, part)


# Of each tiled kernel: how many tensors it reads and writes at every step.
TILED = {"channel_statistics": (1, 0), "forward": (2, 1), "backward sums": (2, 0), "backward gradient": (2, 1)}


def few() -> int:
    """Bytes of a thread that may be spilled.

    On an H100 the gradient's kernel took 7 % less time with 32 warps a multiprocessor and 48 bytes spilled than with 28
    and none. Triton 3.5 and 3.6 spill 56 in some of its configurations.
    """
    from test_compile import triton_version

    return 48 if triton_version() > (3, 6) else 56


def cases():
    return [
        pytest.param(
            *(architecture, "rare" if rare(architecture, steps) else "usual", kernel, steps, dtype, layout),
            id=f"sm_{architecture} {kernel} {steps} {dtype} {layout}",
            marks=[pytest.mark.slow] * rare(architecture, steps),
        )
        for architecture in ARCHITECTURES
        for steps in (STEPS if architecture == 90 else STEPS[:1])
        for dtype in DTYPES
        for layout in (LAYOUTS if architecture == 90 else LAYOUTS[:1])
        for kernel in TILED
    ]


@pytest.mark.parametrize("architecture, part, kernel, steps, dtype, layout", cases())
def test_no_register_spills(architecture, part, kernel, steps, dtype, layout, compiled_for):
    """Within the registers that each program gets of those that run together, but for a few words."""
    found = compiled_for(architecture, part)[f"{kernel} T={steps} {dtype} {layout}"]
    if found["local"] is None:
        pytest.skip("this Triton ships no cuobjdump")
    assert found["local"] <= few(), found
    assert found["registers"] <= found["most registers"]


@pytest.mark.parametrize("architecture, part, kernel, steps, dtype, layout", cases())
def test_tiles_move_sixteen_bytes_at_a_time(architecture, part, kernel, steps, dtype, layout, compiled_for):
    """Or all elements of a thread, where it holds less. Numbers of a channel and partial sums may be narrow."""
    found = compiled_for(architecture, part)[f"{kernel} T={steps} {dtype} {layout}"]
    accesses = {tuple(kind.split()): n for kind, n in found["accesses"].items()}
    bytes_of_a_thread = found["elements"] * DTYPES[dtype].itemsize
    wide = min(16, bytes_of_a_thread)
    assert (wide >= 8 or steps > 8) and not found["masked"]
    reads, writes = (steps * tensors * bytes_of_a_thread // wide for tensors in TILED[kernel])
    assert accesses.get(("ld", str(wide)), 0) >= reads
    assert accesses.get(("st", str(wide)), 0) >= writes
    narrow = {
        kind: sum(n for (k, size), n in accesses.items() if k == kind and int(size) < wide) for kind in ("ld", "st")
    }
    assert narrow["ld"] <= 5 * found["elements"] < steps * TILED[kernel][0] * found["elements"] + 2 * found["elements"]
    assert narrow["st"] <= 3


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_learned_tau_spills_little(architecture, compiled_for):
    found = {key: found for key, found in compiled_for(architecture, "rare").items() if "learned" in key}
    assert len(found) == (len(TILED) + 2) * len(STEPS if architecture == 90 else STEPS[:1])
    # Launches are chosen for an H100; the first sums have a tile more to hold.
    most = few() if architecture == 90 else 96
    assert all(one["local"] is None or one["local"] <= most for one in found.values()), found


@pytest.mark.parametrize(
    "architecture, part", [(90, "usual"), *(pytest.param(a, "rare", marks=pytest.mark.slow) for a in ARCHITECTURES)]
)
def test_the_small_kernels_spill_nothing(architecture, part, compiled_for):
    small = {
        key: found
        for key, found in compiled_for(architecture, part).items()
        if key.split()[0] in ("constants", "finish_backward")
    }
    assert len(small) >= 2 * len(DTYPES) * sum(
        rare(architecture, steps) == (part == "rare") for steps in (STEPS if architecture == 90 else STEPS[:1])
    )
    for key, found in small.items():
        assert found["local"] in (0, None), key


@pytest.mark.slow
def test_every_configuration_that_autotune_measures_compiles_within_its_registers(compiled_for):
    from sadp_fast.ops.batch_norm_lif.configuration import TUNING

    assert all(len(found) == 1 + CANDIDATES for found in TUNING.values())
    found = {
        key: found for key, found in compiled_for(90, "rare").items() if "candidate" in key and found["most registers"]
    }
    assert len(found) == CANDIDATES * len(TILED)
    for key, one in found.items():
        assert one["local"] is None or (one["local"] <= few() and one["registers"] <= one["most registers"]), key


def test_every_variant_compiles(compiled_for):
    variants = {key: found for key, found in compiled_for(90, "usual").items() if "variant" in key}
    numbers = {key: int(key.split("variant ")[1].split()[0]) for key in variants}
    assert set(numbers.values()) == set(range(VARIANTS))
    assert any(key.startswith("backward sums gradient") for key in variants)  # evaluation: one pass
    for key, found in variants.items():
        learned = numbers[key] >= VARIANTS - 4  # a tile more to hold: Triton 3.6 spills two words in one of them
        assert found["local"] is None or found["local"] <= 32 * learned, key
        assert found["masked"] in (True, None), key


if __name__ == "__main__":
    print(json.dumps(compile_for(int(sys.argv[1]), sys.argv[2])))
