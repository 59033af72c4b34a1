"""The operators as torch and Triton see them: opcheck, torch.compile, autocast, and the code that reaches a GPU.

Run as a script, this file compiles kernels for one GPU architecture, which needs no GPU, and prints what came out:
``python tests/ops/test_compile.py 90 usual``, or ``rare`` for the launches that only slow tests ask about.
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sadp_fast.ops.lif import op as _registered  # noqa: F401  the operators, which tests call by name
from sadp_fast.ops.lif.configuration import LONGEST_CHUNK

CHUNK = LONGEST_CHUNK[4]  # of float32, in which most of these tests run

ARCHITECTURES = {80: (16,), 90: (1, 4, 16, 40, 96), 100: (16,)}  # compute capability: the T that are compiled
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATISTICS = ("without", "with")
GRIDS = {"": 0, ", few warps": 10**6}  # a GPU of so many multiprocessors; with few, threads hold fewer elements
SPILLED = {"backward T=96 bfloat16 with statistics": 8}  # bytes of a thread
SPILLED_LEARNED = {  # by several versions of Triton, of which none spills in all of these
    "backward T=40 float32 with statistics, learned": 8,
    "backward T=40 bfloat16 with statistics, learned": 24,
    "backward T=96 bfloat16 with statistics, learned": 216,
}
CANDIDATES = ((4, "bfloat16"), (17, "float32"))  # T and dtype for which all that autotune measures is compiled
VARIANT_STEPS = 2
WALKS = ("recursion", "tile")  # the two ways through a chunk
LEARNED = "learned"  # in the place of tau
DYNAMICS = [(None, False, 0.0), (2.0, True, 0.0), (3.0, True, -0.5), (2.0, False, None), (3.0, False, 0.25)]
DYNAMICS += [(LEARNED, True, 0.25), (LEARNED, False, None)]


# ------------------------------------------------------------------------------- the script: compile without a GPU


def several_chunks(steps: int, dtype: str) -> bool:
    return steps > LONGEST_CHUNK[DTYPES[dtype].itemsize]


def rare(architecture: int, steps: int, dtype: str) -> bool:
    """Whether only slow tests ask: most layers have few steps, and the architectures differ little."""
    return architecture != 90 or several_chunks(steps, dtype)


def grids(steps: int, dtype: str) -> list[str]:
    """Those that the launch depends on in more than its number of elements."""
    return list(GRIDS) if several_chunks(steps, dtype) else [""]


class Recorder:
    """Stands in for a kernel and keeps the arguments it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.call = kernel, None

    def __getitem__(self, grid):
        return lambda *values, **constants: setattr(self, "call", (values, constants))


def compile_recorded(recorder: Recorder, architecture: int):
    """Compile a kernel for the arguments of its last launch, specialised as a launch specialises them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names, (values, constants) = recorder.kernel.arg_names, recorder.call
    options = {name: constants[name] for name in ("num_warps", "enable_fp_fusion")}
    constants = {name: value for name, value in constants.items() if name not in options}
    signature, aligned = {}, []
    for i, (name, value) in enumerate(zip(names, values, strict=False)):
        if isinstance(value, Tensor):
            kinds = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}
            signature[name] = f"*{kinds[value.dtype]}"
            aligned.append(i)
        elif isinstance(value, int):
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            aligned += [i] * (value % 16 == 0)
        else:
            signature[name] = "fp32"
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(recorder.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def memory_accesses(ptx: str) -> Counter:
    """How many instructions of each (ld or st, bytes a thread) touch global memory."""
    found = Counter()
    for kind, modifiers in re.findall(r"\b(ld|st)\.global([.\w:]*)", ptx):
        vector, bits = re.search(r"(?:\.v(\d))?\.[bfus](\d+)$", modifiers).groups()
        found[f"{kind} {int(vector or 1) * int(bits) // 8}"] += 1
    return found


def local_memory(cubin: bytes) -> int | None:
    """Bytes of stack and local memory of a thread (spilled registers among them), by the tool that Triton ships."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text))


def describe(compiled, recorder: Recorder) -> dict:
    return {
        "elements": recorder.call[1]["HOW"].cut.block.value // 32 // recorder.call[1]["num_warps"],  # of a thread
        "accesses": memory_accesses(compiled.asm["ptx"]),
        "local": local_memory(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "exchanges": len(re.findall(r"\bshfl\.sync", compiled.asm["ptx"])),  # between the threads of a warp
        "operations": len(re.findall(r"\btt\.(?:load|store)\b", compiled.asm["ttir"])),
        "fma": len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", compiled.asm["ptx"])),
    }


def compile_for(architecture: int, part: str) -> dict:
    """What the tests ask about one architecture: all of them, or slow ones alone."""
    from sadp_fast.ops.lif import configuration
    from sadp_fast.ops.lif import launch as lif_launch
    from sadp_fast.ops.lif import op as lif
    from sadp_fast.surrogate import FUSED

    forward, backward = Recorder(lif_launch.lif_forward_kernel), Recorder(lif_launch.lif_backward_kernel)
    lif_launch.lif_forward_kernel, lif_launch.lif_backward_kernel = forward, backward

    def launch(x, tau, decay_input, v_reset, surrogate, *, statistics, everything=False):
        lif_launch._forward_plans.clear()  # made for another tuning
        lif_launch._backward_plans.clear()
        leak, soft_reset, learned = tau is not None, v_reset is None, tau == LEARNED
        constants = (0.0, 1.0 if tau is None or learned else tau, leak, decay_input, 1.0, v_reset or 0.0, soft_reset)
        v_init = torch.empty(x.shape[1:]) if everything else None
        reciprocal_tau = torch.empty(()) if learned else None
        chunks = len(x) > configuration.LONGEST_CHUNK[x.element_size()]
        _, v, _, checkpoints, _ = lif._launch_forward(
            x, v_init, reciprocal_tau, *constants, everything, chunks, statistics
        )
        grad_v_seq = torch.empty(x.shape) if everything else None
        scale = torch.empty(x.shape[2]) if everything else None
        grads = (x, v if everything else None, grad_v_seq, scale)
        options = (False, surrogate, 2.0, everything, statistics, learned)
        lif._launch_backward(x, v_init, reciprocal_tau, checkpoints, *grads, *constants, *options)

    report = {}
    for steps in ARCHITECTURES[architecture]:
        for name, dtype in DTYPES.items():
            x = torch.empty(steps, 2, 64, 32, 32, dtype=dtype)
            for statistics, grid in itertools.product(STATISTICS, grids(steps, name)):
                configuration.multiprocessors = lambda device, grid=grid: GRIDS[grid]
                taus = [2.0] if rare(architecture, steps, name) == (part == "rare") else []
                taus += [LEARNED] if architecture == 90 and statistics == "with" and part == "rare" else []
                for tau in taus:
                    launch(x, tau, True, 0.0, 0, statistics=statistics == "with")
                    for direction, recorder in (("forward", forward), ("backward", backward)):
                        key = f"{direction} T={steps} {name} {statistics} statistics{grid}" + f", {tau}" * (tau != 2.0)
                        report[key] = describe(compile_recorded(recorder, architecture), recorder)
    if architecture == 90 and part == "rare":
        candidates = lif_launch.candidates
        configuration.multiprocessors = lambda device: GRIDS[""]
        for steps, name in CANDIDATES:
            x = torch.empty(steps, 2, 64, 32, 32, dtype=DTYPES[name])
            of = {direction: candidates(x, direction) for direction in ("forward", "backward")}
            for number in range(1, max(map(len, of.values()))):
                lif_launch.candidates = lambda x, direction, number=number, of=of: [
                    of[direction][number % len(of[direction])]
                ]
                launch(x, 2.0, True, 0.0, 0, statistics=True)
                for direction, recorder in (("forward", forward), ("backward", backward)):
                    key = f"{direction} T={steps} {name} candidate {number}"
                    report[key] = describe(compile_recorded(recorder, architecture), recorder)
        lif_launch.candidates = candidates
    if architecture == 90 and part == "usual":
        # The interpreter does not check types: every branch of the kernels has to get through the compiler too.
        variants = [(*DYNAMICS[1], surrogate) for surrogate in range(len(FUSED))]
        variants += [(*dynamics, 0) for dynamics in DYNAMICS]
        x = torch.empty(VARIANT_STEPS, 2, 8, 4, 4, dtype=torch.float16)
        for walk in WALKS:
            configuration.TUNING = {
                key: ((VARIANT_STEPS, configuration.Tuning(4, tile=walk == "tile")),) for key in configuration.TUNING
            }
            configuration.multiprocessors = lambda device: GRIDS[""]
            for variant in variants:
                launch(x, *variant, statistics=True, everything=True)
                for direction, recorder in (("forward", forward), ("backward", backward)):
                    report[f"{direction} {walk} {variant}"] = describe(
                        compile_recorded(recorder, architecture), recorder
                    )
    return report


# ---------------------------------------------------------------------------------------- compiled for a real GPU


def triton_version() -> tuple[int, ...]:
    """Major and minor number."""
    import triton

    return tuple(int(n) for n in triton.__version__.split(".")[:2])


@pytest.fixture
def compiled_for(compiled_report):
    return lambda architecture, part: compiled_report(__file__, architecture, part)


@pytest.mark.slow
def test_every_configuration_that_autotune_measures_compiles(compiled_for):
    report = compiled_for(90, "rare")
    for steps, name in CANDIDATES:
        for direction in ("forward", "backward"):
            found = [
                value for key, value in report.items() if key.startswith(f"{direction} T={steps} {name} candidate")
            ]
            assert len(found) >= 4 and len({value["elements"] for value in found}) >= 2


def cases():
    return [
        pytest.param(
            *(architecture, "rare" if rare(architecture, steps, dtype) else "usual"),
            *(f"{direction} T={steps} {dtype} {statistics} statistics{grid}", steps, dtype),
            marks=[pytest.mark.slow] * rare(architecture, steps, dtype),
        )
        for architecture, all_steps in ARCHITECTURES.items()
        for steps in all_steps
        for dtype in DTYPES
        for statistics in STATISTICS
        for grid in grids(steps, dtype)
        for direction in ("forward", "backward")
    ]


@pytest.mark.parametrize("architecture, part, key, steps, dtype", cases())
def test_no_register_spills(architecture, part, key, steps, dtype, compiled_for):
    """But for a word of each of a thread's two elements in one case."""
    local = compiled_for(architecture, part)[key]["local"]
    if local is None:
        pytest.skip("this Triton ships no cuobjdump")
    assert local <= SPILLED.get(key, 0)


@pytest.mark.slow
def test_a_learned_tau_spills_little(compiled_for):
    """Its gradient needs a register more for every element and step."""
    spilled = {key: found["local"] for key, found in compiled_for(90, "rare").items() if key.endswith(LEARNED)}
    assert len(spilled) == 2 * sum(len(grids(steps, dtype)) for steps in ARCHITECTURES[90] for dtype in DTYPES)
    assert all(local is None or local <= SPILLED_LEARNED.get(key, 0) for key, local in spilled.items()), spilled


@pytest.mark.parametrize("architecture, part, key, steps, dtype", cases())
def test_memory_is_read_and_written_16_bytes_at_a_time(architecture, part, key, steps, dtype, compiled_for):
    """Or all elements of a thread at a time, where long chunks leave registers for fewer.

    Only the statistics, one number of a program and step, are written as single words.
    """
    report = compiled_for(architecture, part)[key]
    wide = min(16, report["elements"] * DTYPES[dtype].itemsize)
    assert wide == 16 or steps > 8
    accesses = {tuple(kind.split()): n for kind, n in report["accesses"].items()}
    narrow = {(kind, int(size)): n for (kind, size), n in accesses.items() if int(size) < wide}
    if wide > 4:
        statistics = narrow.pop(("st", 4), 0)
        assert 0 < statistics <= steps if " with " in key else statistics == 0
    assert narrow == {}
    assert any(kind == "ld" for kind, _ in accesses) and any(kind == "st" for kind, _ in accesses)


@pytest.mark.parametrize("architecture, part, key, steps, dtype", cases())
def test_tiles_stay_in_registers_and_are_accessed_as_a_whole(architecture, part, key, steps, dtype, compiled_for):
    """Only statistics go through shared memory; with a load and a store a step, long T took many seconds to compile."""
    report = compiled_for(architecture, part)[key]
    assert "without" not in key or report["shared"] == 0
    if several_chunks(steps, dtype):
        assert report["operations"] < 10


@pytest.mark.parametrize(
    "architecture, part", [(90, "usual"), *(pytest.param(a, "rare", marks=pytest.mark.slow) for a in (80, 100))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_16_steps_take_16_exchanges(architecture, part, dtype, compiled_for):
    """And no shared memory; one by one they would take 80."""
    report = compiled_for(architecture, part)
    assert report[f"backward T=16 {dtype} without statistics"]["exchanges"] == 0
    found = report[f"backward T=16 {dtype} with statistics"]
    assert (found["exchanges"], found["shared"]) == (16, 0)


@pytest.mark.parametrize("dynamics", [d for d in DYNAMICS if d[0] != 2.0], ids=str)
@pytest.mark.parametrize("direction", ("forward", "backward"))
@pytest.mark.parametrize("walk", WALKS)
def test_no_contraction(walk, direction, dynamics, compiled_for):
    """A fused multiply-add in the potential could flip a spike at the threshold; where 1 / tau is exact it cannot.

    The backward kernel has those that are written there, in the gradients.
    """
    report = compiled_for(90, "usual")[f"{direction} {walk} {(*dynamics, 0)}"]
    tau, _, v_reset = dynamics
    written = 2 if walk == "tile" else (1 if v_reset is None else 2) + (tau == LEARNED)  # an element and step
    assert report["fma"] == (0 if direction == "forward" else written * VARIANT_STEPS * report["elements"])


def test_every_variant_compiles(compiled_for):
    from sadp_fast.surrogate import FUSED

    report = compiled_for(90, "usual")
    variants = [key for key in report if "T=" not in key]
    # one of the dynamics is counted among the surrogates
    assert len(variants) == len(WALKS) * 2 * (len(FUSED) + len(DYNAMICS) - 1)
    for key in variants:
        assert report[key]["local"] in (0, None), key


# ----------------------------------------------------------------------------------------------------------- opcheck

CONSTANTS = (0.1, 3.0, True, True, 1.0, -0.2, False)  # v_init_value, tau, leak, decay_input, threshold, rest, soft


def operator_inputs(device):
    """x and v_init of each kind that reaches the operators."""
    torch.manual_seed(0)
    channels_last = torch.randn(6, 4, 3, 5, device=device).contiguous(memory_format=torch.channels_last)
    return {
        "plain": (torch.randn(3, 2, 7, device=device), None),
        "initial v": (torch.randn(3, 2, 7, device=device), torch.randn(2, 7, device=device)),
        "several chunks": (torch.randn(CHUNK + 1, 2, 5, device=device), torch.randn(2, 5, device=device)),
        "channels last": (channels_last.unflatten(0, (3, 2)), None),
        "sliced": (torch.randn(3, 2, 7, 2, device=device)[..., 1], torch.randn(7, 2, device=device).t()),
        "expanded": (torch.randn(3, 1, 1, device=device).expand(3, 2, 7), None),
        "batch first": (torch.randn(2, 3, 7, device=device).transpose(0, 1), None),
        "half": (torch.randn(3, 2, 7, device=device).bfloat16(), torch.randn(2, 7, device=device)),
        "one element": (torch.randn(1, 1, 1, device=device), None),
        "no inner dimension": (torch.randn(3, 2, device=device), None),
        "empty": (torch.randn(3, 0, 7, device=device), None),
    }


INPUT_KINDS = list(operator_inputs("cpu"))


@pytest.mark.parametrize("flags", [(False, False, False), (True, True, True)], ids=["no extras", "all extras"])
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_opcheck_forward(kind, flags, kernel_device):
    x, v_init = operator_inputs(kernel_device)[kind]
    reciprocal_tau = torch.tensor(0.3, device=kernel_device) if all(flags) else None
    torch.library.opcheck(torch.ops.sadp_fast.lif_forward.default, (x, v_init, reciprocal_tau, *CONSTANTS, *flags))


@pytest.mark.parametrize("extras", [False, True], ids=["no extras", "all extras"])
@pytest.mark.parametrize("kind", INPUT_KINDS)
def test_opcheck_backward(kind, extras, kernel_device):
    x, v_init = operator_inputs(kernel_device)[kind]
    inputs = (x, v_init, torch.tensor(0.3, device=kernel_device) if extras else None)
    _, v, v_seq, checkpoints, _ = torch.ops.sadp_fast.lif_forward(*inputs, *CONSTANTS, True, True, False)
    scale = torch.ones(x.shape[2], device=kernel_device) if extras and x.ndim > 2 else None
    grad_spikes = None if extras else torch.ones_like(x)
    grads = (grad_spikes, v if extras else None, v_seq if extras else None, scale)
    options = (False, 0, 4.0, extras, extras, extras)
    torch.library.opcheck(
        torch.ops.sadp_fast.lif_backward.default, (*inputs, checkpoints, *grads, *CONSTANTS, *options)
    )


# ----------------------------------------------------------------------------------------------------- torch.compile


@pytest.fixture(params=["reference", "kernels"])
def path(request, kernel_device):
    """(device, backend of our nodes)."""
    return ("cpu", "torch") if request.param == "reference" else (kernel_device, "triton")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(module, device):
    return torch.compile(module, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")


def network(backend, **options):
    from sadp_fast.nn.lif import IFNode, LIFNode, ParametricLIFNode

    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(6, 10),
        LIFNode(tau=3.0, step_mode="m", backend=backend, **options),
        nn.Linear(10, 8),
        ParametricLIFNode(v_threshold=0.3, step_mode="m", backend=backend),
        nn.Linear(8, 5),
        IFNode(v_threshold=0.3, v_reset=None, step_mode="m", backend=backend),
    )


def data(device, steps=4, examples=3, seed=0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(steps, examples, 6, generator=generator) * 3).to(device)


def loss_of(output: Tensor) -> Tensor:
    return (output.mean(0) - 0.5).square().sum()


def assert_same_training(eager: nn.Module, other: nn.Module, eager_loss: Tensor, other_loss: Tensor):
    torch.testing.assert_close(other_loss, eager_loss, rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(eager.named_parameters(), other.parameters(), strict=True):
        assert a.grad.abs().max() > 1e-4, name
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "steps, statistics", [(3, False), (3, True), pytest.param(CHUNK + 1, True, marks=pytest.mark.slow)]
)
def test_fullgraph_forward_and_backward(steps, statistics, path):
    """Compiled and eager give the same loss, gradients, states and statistics, call after call."""
    from sadp_fast.nn.node import neurons, reset

    device, backend = path
    if steps > 3 and backend == "torch":
        pytest.skip("the reference has no chunks, and Dynamo unrolls its steps slowly")
    eager, other = (network(backend, store_v_seq=True).to(device) for _ in range(2))
    run = compiled(other, device)
    for model in (eager, other):
        for node in neurons(model).values():
            node.collect_statistics = statistics
    if statistics:
        other(data(device, steps))  # the uncompiled call that makes the buffers
        reset(other)
    for seed in range(2):
        x = data(device, steps, seed=seed)
        for model in (eager, other):
            model.zero_grad()
            reset(model)
        eager_loss, other_loss = loss_of(eager(x)), loss_of(run(x))
        eager_loss.backward()
        other_loss.backward()
        assert_same_training(eager, other, eager_loss, other_loss)
        for a, b in zip(neurons(eager).values(), neurons(other).values(), strict=True):
            torch.testing.assert_close(b.v, a.v, rtol=1e-5, atol=1e-6)
            assert (a.spike_count is None) == (b.spike_count is None) == (not statistics)
            if statistics:
                assert torch.equal(a.spike_count, b.spike_count)
                assert (a.grad_norm_sq > 0).any()
                torch.testing.assert_close(b.grad_norm_sq, a.grad_norm_sq, rtol=1e-4, atol=1e-12)
        torch.testing.assert_close(other[1].v_seq, eager[1].v_seq, rtol=1e-5, atol=1e-6)


def test_state_crosses_compiled_calls(path):
    device, backend = path
    eager, other = (network(backend).to(device) for _ in range(2))
    run = compiled(other, device)
    first, second = data(device), data(device, seed=1)
    eager_loss = loss_of(eager(first)) + loss_of(eager(second))
    other_loss = loss_of(run(first)) + loss_of(run(second))
    eager_loss.backward()
    other_loss.backward()
    assert_same_training(eager, other, eager_loss, other_loss)


def test_compiled_with_other_batch_sizes(path):
    from sadp_fast.nn.node import reset

    device, backend = path
    eager, other = (network(backend).to(device) for _ in range(2))
    run = compiled(other, device)
    for examples in (3, 5):
        for model in (eager, other):
            model.zero_grad()
            reset(model)
        x = data(device, examples=examples)
        eager_loss, other_loss = loss_of(eager(x)), loss_of(run(x))
        eager_loss.backward()
        other_loss.backward()
        assert_same_training(eager, other, eager_loss, other_loss)


def test_compiled_with_other_image_sizes(path):
    """Dynamo makes the dimensions symbolic that change between calls, the inner ones here."""
    from sadp_fast.nn.lif import LIFNode

    device, backend = path
    node = LIFNode(step_mode="m", backend=backend)
    run = compiled(node, device)
    for size in (3, 5):
        x = torch.randn(2, 2, 3, size, size + 1, generator=torch.Generator().manual_seed(size)).to(device)
        results = []
        for function in (node, run):
            node.reset()
            x_in = x.clone().requires_grad_()
            spikes = function(x_in)
            (spikes * torch.arange(size + 1, device=device)).sum().backward()
            results.append((spikes.detach(), x_in.grad))
        assert torch.equal(results[0][0], results[1][0])
        torch.testing.assert_close(results[1][1], results[0][1], rtol=1e-5, atol=1e-6)


def test_compiled_channels_last(path):
    from sadp_fast.nn.lif import LIFNode

    device, backend = path
    x = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0)).mul(2).to(device)
    x = x.contiguous(memory_format=torch.channels_last).unflatten(0, (3, 2))
    results = []
    for wrap in (lambda node: node, lambda node: compiled(node, device)):
        node = LIFNode(step_mode="m", backend=backend)
        x_in = x.clone().requires_grad_()
        assert x_in.stride() == x.stride()
        spikes = wrap(node)(x_in)
        (spikes * torch.arange(5, device=device)).sum().backward()
        results.append((spikes.detach(), node.v.detach(), x_in.grad))
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("uncompiled_examples", [None, 2])
def test_compiled_statistics_without_memory_are_a_clear_error(uncompiled_examples, path):
    """Before the first uncompiled forward pass, or after one of a smaller batch."""
    from sadp_fast.nn.node import reset

    device, backend = path
    model = network(backend).to(device)
    model[1].collect_statistics = True
    if uncompiled_examples:
        model(data(device, examples=uncompiled_examples))
        reset(model)
    with pytest.raises(Exception, match=r"collect_statistics under torch\.compile.*\(4, 3\)"):
        compiled(model, device)(data(device))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_statistics_of_several_single_steps(fullgraph, path):
    """They would all write into one buffer: an error, or uncompiled from the second one on."""
    from sadp_fast import LIFNode

    device, backend = path
    node = LIFNode(backend=backend).to(device)
    node.collect_statistics = True
    x = torch.randn(2, 3, 6, device=device).requires_grad_()
    node(x[0])
    node.reset()
    run = torch.compile(node, backend="aot_eager" if device == "cpu" else "inductor", fullgraph=fullgraph)
    first = run(x[0])
    if fullgraph:
        with pytest.raises(Exception, match=r"one buffer, which an earlier call since the last reset.*step_mode='m'"):
            run(x[1])
        return
    (first.sum() + 2 * run(x[1]).sum()).backward()
    torch.testing.assert_close(node.grad_norm_sq, x.grad.square().sum(2), rtol=1e-5, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.gpu)], ids=["bfloat16", "float16"]
)
@pytest.mark.parametrize("use_compile", [False, True], ids=["eager", "compiled"])
def test_autocast(use_compile, dtype, path):
    """Half-precision input current, float32 potential; the same as the nodes alone on the same numbers."""
    device, backend = path
    model = network(backend).to(device)
    run = compiled(model, device) if use_compile else model
    inputs = []
    hooks = (
        []
        if use_compile
        else [model[i].register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())) for i in (1, 5)]
    )
    with torch.autocast(device, dtype):
        output = run(data(device))
        loss = loss_of(output.float())
    assert output.dtype == dtype
    assert model[1].v.dtype == model[3].v.dtype == model[5].v.dtype == torch.float32
    loss.backward()
    for hook in hooks:
        hook.remove()
    for parameter in model.parameters():
        assert parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 1e-4
    if not use_compile:
        assert [x.dtype for x in inputs] == [dtype, dtype]
        potential = model[5].v
        model[5].reset()
        assert torch.equal(model[5](inputs[1]), output.detach())
        assert torch.equal(model[5].v, potential)
    assert 0 < output.float().mean() < 1


@pytest.mark.gpu
def test_float16_with_a_gradient_scaler():
    """Loss scaling passes through the kernels and comes off again."""
    results = []
    for scale in (1.0, 2.0**10):
        model = network(None).to("cuda")
        scaler = torch.amp.GradScaler("cuda", init_scale=scale)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with torch.autocast("cuda", torch.float16):
            output = model(data("cuda"))
        scaler.scale(loss_of(output.float())).backward()
        scaler.unscale_(optimizer)
        results.append([p.grad.clone() for p in model.parameters()])
    for plain, scaled in zip(*results, strict=True):
        assert plain.abs().max() > 1e-4
        torch.testing.assert_close(scaled, plain, rtol=1e-2, atol=1e-4)


if __name__ == "__main__":
    print(json.dumps(compile_for(int(sys.argv[1]), sys.argv[2])))
