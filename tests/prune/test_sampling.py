"""sample(): against a NumPy oracle to the bit, against probability theory, and on two devices.

The statistical tests use fixed seeds, so each gives the same verdict at every run; the stated error probability is the
one with which a correct implementation would fail had the seeds been chosen at random.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sadp_fast import inclusion_probabilities
from sadp_fast.prune import sampling
from sadp_fast.prune.sampling import Sample, sample

WORD = np.uint64(0xFFFFFFFF)
DTYPES = [torch.float32, torch.float64]

# Two-sided 6 sigma: 2e-9 for one normal variable, below 1e-6 for the at most 100 of any test here.
SIGMAS = 6.0


# --- the oracle -------------------------------------------------------------------------------------------------------


def philox4x32(counter, key):
    """Philox4x32-10 as in the publication; counter: four arrays or integers, key: two integers; returns four arrays."""
    c0, c1, c2, c3 = (np.asarray(c, dtype=np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        product0, product1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        high0, high1 = product0 >> np.uint64(32), product1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0), product1 & WORD, high0 ^ c3 ^ np.uint64(k1), product0 & WORD
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def random_words(n, seed, epoch):
    """The 32-bit random word of each item: block index // 4, word index % 4."""
    blocks = np.arange((n + 3) // 4)
    words = philox4x32((blocks, 0 * blocks, epoch % 2**32, (epoch >> 32) % 2**32), (seed % 2**32, seed >> 32))
    return np.stack(words, axis=1).reshape(-1)[:n]


def oracle(p, seed, epoch=0):
    """Indices and weights of sample(p, seed=seed, epoch=epoch) for a tensor p."""
    thresholds = np.ceil(p.detach().cpu().double().numpy() * 2.0**32).astype(np.uint64)
    indices = np.flatnonzero(random_words(len(thresholds), seed, epoch) < thresholds)
    scale = np.float64(sum(map(int, thresholds)) if len(thresholds) < 1000 else int(thresholds.sum()))
    weights = (scale / np.float64(max(len(thresholds), 1)) / thresholds[indices].astype(np.float64)).astype(np.float32)
    return indices, weights


def assert_same_bits(drawn: Sample, indices, weights):
    assert drawn.indices.dtype == torch.int64 and drawn.weights.dtype == torch.float32
    np.testing.assert_array_equal(drawn.indices.cpu().numpy(), indices)
    np.testing.assert_array_equal(drawn.weights.cpu().numpy().view(np.uint32), np.asarray(weights).view(np.uint32))
    assert drawn.count.dtype == torch.int64 and drawn.count.shape == () and drawn.count.item() == len(indices)


def probabilities(n, dtype=torch.float32, seed=0):
    """Random probabilities with the special values mixed in."""
    p = torch.rand(n, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    for offset, special in enumerate(
        [0.0, 1.0, 1e-12, torch.finfo(dtype).tiny / 8, 1 - torch.finfo(dtype).eps / 2, -0.0]
    ):
        p[offset + 5 :: 41] = special
    return p


def drawn_mask(n, **arguments):
    """0/1 float64 array of one draw with p = 1/2."""
    mask = np.zeros(n)
    mask[sample(torch.full((n,), 0.5), **arguments).indices.numpy()] = 1
    return mask


# --- the generator ----------------------------------------------------------------------------------------------------


def test_oracle_philox_gives_the_published_vectors():
    # Random123, kat_vectors, philox4x32 with 10 rounds.
    pi_counter, pi_key = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
    for counter, key, expected in [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi_counter, pi_key, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ]:
        assert tuple(int(word) for word in philox4x32(counter, key)) == expected


def test_published_vector_decides_to_the_last_bit(device):
    words = torch.tensor([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], dtype=torch.float64, device=device)
    assert sample(words / 2**32, seed=0).indices.tolist() == []
    assert sample((words + 1) / 2**32, seed=0).indices.tolist() == [0, 1, 2, 3]


def test_epoch_zero_is_tritons_randint4x(kernel_device):
    triton = pytest.importorskip("triton")
    tl = pytest.importorskip("triton.language")

    @triton.jit
    def kernel(out, seed, BLOCKS: tl.constexpr):
        block = tl.arange(0, BLOCKS)
        w0, w1, w2, w3 = tl.randint4x(seed, block)
        tl.store(out + 4 * block, w0)
        tl.store(out + 4 * block + 1, w1)
        tl.store(out + 4 * block + 2, w2)
        tl.store(out + 4 * block + 3, w3)

    out = torch.empty(256, dtype=torch.int32, device=kernel_device)
    for seed in (0, 12345, 2**31 - 1):
        kernel[(1,)](out, seed, BLOCKS=64)
        np.testing.assert_array_equal(out.cpu().numpy().view(np.uint32), random_words(256, seed, 0))


# --- the whole function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_oracle_to_the_bit(dtype, device):
    for n in (0, 1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 4097, 32768, 65537, 3_000_001):
        p = probabilities(n, dtype)
        assert_same_bits(sample(p.to(device), seed=3, epoch=11), *oracle(p, 3, 11))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 0x299F31D0A4093822, 2**64 - 1])
def test_every_bit_of_seed_and_epoch_counts(seed, device):
    for epoch in (0, 1, 2**32 - 1, 2**32, 2**63 - 1, -1):
        p = probabilities(777).to(device)
        expected = oracle(p, seed, epoch)
        assert_same_bits(sample(p, seed=seed, epoch=epoch), *expected)
        assert_same_bits(sample(p, seed=seed, epoch=torch.tensor(epoch, device=device)), *expected)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1) | st.sampled_from([0.0, 1.0, 2.0**-32, 2.0**-33, 0.5]), max_size=150),
    st.sampled_from(DTYPES),
    st.integers(0, 2**64 - 1),
    st.integers(-(2**63), 2**63 - 1),
)
def test_any_probabilities_equal_the_oracle(values, dtype, seed, epoch):
    p = torch.tensor(values, dtype=dtype)
    assert_same_bits(sample(p, seed=seed, epoch=epoch), *oracle(p, seed, epoch))


def test_accepts_any_layout_and_leaves_no_graph(device):
    wide = probabilities(3 * 5000).to(device)
    for p in (
        wide.view(-1, 3)[:, 1],
        wide[1:5002],
        wide[3:5003].requires_grad_(),
        torch.full((1,), 0.7, device=device).expand(999),
    ):
        drawn = sample(p, seed=8)
        assert_same_bits(drawn, *oracle(p, 8))
        assert not drawn.weights.requires_grad
        assert drawn.indices.device == drawn.weights.device == drawn.count.device == p.device


def test_numpy_integers_are_integers(device):
    p = probabilities(500).to(device)
    drawn = sample(p, seed=np.uint64(2**63), epoch=np.int32(2), capacity=np.int64(500))
    assert torch.equal(drawn.indices[: drawn.count], sample(p, seed=2**63, epoch=2).indices)


def test_same_bits_for_any_number_of_threads():
    p = probabilities(700_001)  # 22 blocks, at most 6 threads
    expected = oracle(p, 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            assert_same_bits(sample(p, seed=1), *expected)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_python_threads_do_not_disturb_each_other():
    p = probabilities(300_001)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda seed: sample(p, seed=seed), range(8)))
    for seed, drawn in enumerate(results):
        assert_same_bits(drawn, *oracle(p, seed))


def test_one_is_always_drawn_and_zero_never(device):
    p = torch.tensor([0.0, 1.0], device=device).repeat(50_000)
    for epoch in range(5):
        drawn = sample(p, seed=4, epoch=epoch)
        assert torch.equal(drawn.indices, torch.arange(1, 100_000, 2, device=device))
    assert sample(torch.zeros(1000, device=device), seed=0).count.item() == 0


def test_full_data_has_weights_of_exactly_one(device):
    drawn = sample(torch.ones(12_345, device=device), seed=9)
    assert torch.equal(drawn.indices, torch.arange(12_345, device=device))
    assert torch.equal(drawn.weights, torch.ones(12_345, device=device))


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.7])
def test_uniform_probabilities_have_weights_of_exactly_one(keep, device):
    drawn = sample(torch.full((9_999,), keep, device=device), seed=9)
    assert torch.equal(drawn.weights, torch.ones_like(drawn.weights))


def test_weights_are_m_over_n_p(device):
    p = torch.linspace(0.01, 1, 4001, dtype=torch.float64, device=device)
    drawn = sample(p, seed=2)
    torch.testing.assert_close(drawn.weights.double(), p.mean() / p[drawn.indices], rtol=1e-6, atol=0)


def test_a_tiny_probability_is_rounded_up_and_its_weight_is_that_of_the_rounded_one(device):
    # The example with the smallest random word is the one that a tiny p can draw.
    n = 1_000_000
    words = random_words(n, 0, 0)
    item = int(words.argmin())
    p = torch.zeros(n, dtype=torch.float64, device=device)
    p[item] = (float(words[item]) + 1e-3) / 2**32  # rounded up to the next multiple of 2^-32
    drawn = sample(p, seed=0)
    assert drawn.indices.tolist() == [item]
    assert drawn.weights.tolist() == [np.float32(1 / n)]


# --- probability ------------------------------------------------------------------------------------------------------


def test_inclusion_frequencies_are_p():
    """Binomial(4e5, p) within 6 sigma for 8 values of p: fails with probability below 2e-8; sees 1 % more than 1/2."""
    values = torch.tensor([2.0**-10, 0.02, 0.1, 0.3, 0.5, 0.75, 0.9, 0.999], dtype=torch.float64)
    size, epochs = 20_000, 20
    p = values.repeat_interleave(size)
    counts = np.zeros(len(values))
    for epoch in range(epochs):
        counts += np.bincount(sample(p, seed=17, epoch=epoch).indices.numpy() // size, minlength=len(values))
    trials = size * epochs
    z = (counts - trials * values.numpy()) / np.sqrt(trials * (values * (1 - values)).numpy())
    assert np.abs(z).max() < SIGMAS


def test_every_example_has_its_own_frequency():
    """Chi-square, 512 examples, 4000 epochs; Laurent-Massart with x = 15: fails with probability 2 e^-15 < 1e-6."""
    n, epochs, x = 512, 4000, 15.0
    p = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    counts = np.zeros(n)
    for epoch in range(epochs):
        counts[sample(p, seed=23, epoch=epoch).indices.numpy()] += 1
    chi_square = ((counts - epochs * p.numpy()) ** 2 / (epochs * (p * (1 - p)).numpy())).sum()
    # Above: examples that are not drawn with their p. Below: epochs that are not independent (a stratified draw, say).
    assert n - 2 * math.sqrt(n * x) < chi_square < n + 2 * math.sqrt(n * x) + 2 * x


def test_weighted_sums_are_unbiased_with_the_variance_of_independent_draws():
    """Mean and variance of 4000 weighted sums against the exact ones, 6 sigma each: fails with probability < 1e-8."""
    n, epochs = 2000, 4000
    generator = torch.Generator().manual_seed(5)
    p = torch.rand(n, dtype=torch.float64, generator=generator) * 0.9 + 0.05
    x = torch.randn(n, dtype=torch.float64, generator=generator).exp() * (
        1.5 - p
    )  # correlated with p, not proportional
    sums = []
    for epoch in range(epochs):
        drawn = sample(p, seed=31, epoch=epoch)
        sums.append((drawn.weights.double() * x[drawn.indices]).sum().item())
    mean_p = p.mean()
    expected = (mean_p * x.sum()).item()
    variance = (mean_p**2 * (x**2 * (1 / p - 1)).sum()).item()
    assert abs(np.mean(sums) - expected) < SIGMAS * math.sqrt(variance / epochs)
    # Dependence between the draws of one epoch would change the variance of the sum.
    assert abs(np.var(sums) / variance - 1) < SIGMAS * math.sqrt(2 / (epochs - 1))
    # The test can see a bias: the unweighted estimator is far outside.
    unweighted = (p * x).sum().item() * mean_p.item()
    assert abs(unweighted - expected) > 10 * SIGMAS * math.sqrt(variance / epochs)


def test_neighbours_are_drawn_independently():
    """Correlation of items at 10 distances, 6 sigma: fails with probability below 2e-8."""
    n = 400_000
    signs = 2 * drawn_mask(n, seed=41) - 1
    for distance in (1, 2, 3, 4, 8, 64, 127, 128, 4096, 32768):
        assert abs((signs[distance:] * signs[:-distance]).sum()) < SIGMAS * math.sqrt(n - distance)


def test_epochs_and_seeds_are_independent():
    """Correlation of each pair of 8 draws, 6 sigma: fails with probability below 28 * 2e-9 < 1e-7."""
    n = 200_000
    streams = [(0, 0), (1, 0), (0, 1), (1, 1), (2**32, 0), (0, 2**32), (2**63, 0), (0, -1)]
    signs = np.stack([2 * drawn_mask(n, seed=seed, epoch=epoch) - 1 for seed, epoch in streams])
    correlations = signs @ signs.T / math.sqrt(n)
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < SIGMAS


# --- capacity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_capacity_pads_or_keeps_the_first(dtype, device):
    for room in (-5000, -1000, -1, 0, 1, 70, 40_000):
        p = probabilities(20_001, dtype)
        indices, weights = oracle(p, 6)
        capacity = max(len(indices) + room, 0)
        drawn = sample(p.to(device), seed=6, capacity=capacity)
        kept = min(capacity, len(indices))
        assert drawn.indices.shape == drawn.weights.shape == (capacity,)
        assert drawn.count.item() == len(indices)
        np.testing.assert_array_equal(drawn.indices[:kept].cpu().numpy(), indices[:kept])
        np.testing.assert_array_equal(drawn.weights[:kept].cpu().numpy(), weights[:kept])
        assert (drawn.indices[kept:] == -1).all() and (drawn.weights[kept:] == 0).all()


@pytest.mark.parametrize("capacity", [None, 0, 7])
def test_an_empty_p_gives_an_empty_draw(capacity, device):
    drawn = sample(torch.empty(0, device=device), seed=0, capacity=capacity)
    assert drawn.indices.tolist() == [-1] * (capacity or 0)
    assert drawn.weights.tolist() == [0.0] * (capacity or 0)
    assert drawn.count.item() == 0


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": [0.5]}, TypeError, r"p must be a tensor, got list; pass torch\.as_tensor"),
        ({"p": torch.ones(3, dtype=torch.float16)}, TypeError, r"p must be float32 or float64, got torch\.float16"),
        ({"p": torch.ones(3, dtype=torch.int64)}, TypeError, r"p must be float32 or float64, got torch\.int64"),
        ({"p": torch.ones(3, 2)}, ValueError, r"p must have one dimension, got shape \(3, 2\); pass p\.flatten"),
        ({"p": torch.tensor(0.5)}, ValueError, r"p must have one dimension, got shape \(\)"),
        ({"p": torch.ones(3, device="meta")}, ValueError, r"p must be on the CPU or a CUDA device, got meta"),
        ({"p": torch.ones(1).expand(2**31 + 1)}, ValueError, r"p must have at most 2\*\*31 entries, got 2147483649"),
        ({"seed": 1.5}, TypeError, r"seed must be an integer, got float"),
        ({"seed": torch.tensor(1)}, TypeError, r"seed must be an integer, got Tensor"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*64\), got -1; pass seed % 2\*\*64"),
        ({"seed": 2**64}, ValueError, r"seed must be in \[0, 2\*\*64\), got 18446744073709551616"),
        ({"epoch": 0.0}, TypeError, r"epoch must be an integer or a 0-dim int64 tensor, got float"),
        ({"epoch": torch.tensor(0.0)}, TypeError, r"epoch must be .* got torch\.float32 of shape \(\)"),
        ({"epoch": torch.tensor([0])}, TypeError, r"epoch must be .* got torch\.int64 of shape \(1,\)"),
        ({"epoch": torch.tensor(0, device="meta")}, ValueError, r"epoch must be on p's device cpu, got meta"),
        ({"epoch": 2**63}, ValueError, r"epoch must be in \[-2\*\*63, 2\*\*63\), got 9223372036854775808"),
        ({"capacity": 2.0}, TypeError, r"capacity must be an integer or None, got float"),
        ({"capacity": -1}, ValueError, r"capacity must not be negative, got -1"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        sample(**{"p": torch.ones(3), "seed": 0, **arguments})


@pytest.mark.parametrize("value", [math.nan, -1e-30, 1 + 2**-20, math.inf, -math.inf])
def test_no_probability_names_the_first_culprit(value, device):
    for index, dtype in itertools.product((0, 130, 70_000), DTYPES):
        p = probabilities(70_001, dtype)
        p[index:] = 2.0
        p[index] = value
        with pytest.raises(
            ValueError, match=rf"p\[{index}\] is {p[index].item()}, not a probability; .*\[0, 1\]".replace("+", r"\+")
        ):
            sample(p.to(device), seed=0)
        if device == "cpu":
            with pytest.raises(ValueError, match=rf"p\[{index}\]"):
                sample(p, seed=0, capacity=10)


def test_a_cuda_tensor_without_a_cuda_build_names_the_remedy(monkeypatch):
    class CudaTensor(torch.Tensor):  # poses as one, so that the test needs no GPU
        is_cuda = True
        device = torch.device("cuda", 0)

    monkeypatch.setattr(sampling._native, "has_cuda", False)
    with pytest.raises(RuntimeError, match=r"p is on cuda:0, .* built without CUDA; reinstall it with SADP_CUDA=ON"):
        sample(torch.rand(3).as_subclass(CudaTensor), seed=0)


# --- CUDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", [1e-3, 0.05, 0.5, 1.0])
def test_cuda_gives_the_bits_of_the_cpu(keep, dtype):
    p = probabilities(5_000_003, dtype) * keep
    for start in (0, 1):  # aligned for 16-byte loads, and not
        on_cpu, on_cuda = sample(p[start:], seed=7, epoch=3), sample(p.cuda()[start:], seed=7, epoch=3)
        assert torch.equal(on_cpu.indices, on_cuda.indices.cpu())
        assert torch.equal(on_cpu.weights.view(torch.int32), on_cuda.weights.cpu().view(torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("cooperative", [True, False])
@pytest.mark.parametrize("room", [128, 398, 4000])
@pytest.mark.parametrize("blocks", [1, 2, 7, 60])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_gives_the_same_bits_for_any_launch_shape(dtype, blocks, room, cooperative, monkeypatch):
    """`room` decides how much of the draw stays on the chip between the phases: all, a part, or one tile a warp."""
    if room * 192 > torch.cuda.get_device_properties(0).shared_memory_per_block_optin - 2048:
        pytest.skip("more shared memory than this device has")
    native = sampling._native
    shape = native.Shape(min(blocks, torch.cuda.get_device_properties(0).multi_processor_count), room, cooperative)
    monkeypatch.setattr(sampling, "_launch_shape", lambda n, device: (shape, native.cuda_workspace(n, shape.blocks)))
    for n in (100_001, 2_000_003):
        p = probabilities(n, dtype)
        indices, weights = oracle(p, 5)
        for capacity in (None, len(indices), 1000):
            drawn = sample(p.cuda(), seed=5, capacity=capacity)
            kept = len(indices) if capacity is None else capacity
            expected = Sample(torch.from_numpy(indices[:kept]), torch.from_numpy(weights[:kept]), drawn.count)
            assert torch.equal(drawn.indices.cpu(), expected.indices) and drawn.count.item() == len(indices)
            assert torch.equal(drawn.weights.cpu().view(torch.int32), expected.weights.view(torch.int32))


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_keeps_rare_draws_on_the_chip_no_further_than_16_bits_reach():
    """A warp that draws little fills its share of the chip slowly; places beyond 2^16 items are read a second time."""
    if torch.cuda.mem_get_info()[0] < 4 * 2**30:
        pytest.skip("needs 4 GiB of free GPU memory")
    p = torch.full((600_000_000,), 1e-5, device="cuda")  # above 2^16 items a warp on up to 286 multiprocessors
    p[-1000:] = 1.0
    drawn = sample(p, seed=2, capacity=10_000)
    expected = sample(p.cpu(), seed=2)
    count = expected.count.item()
    assert drawn.count.item() == count
    assert torch.equal(drawn.indices[:count].cpu(), expected.indices)
    assert torch.equal(drawn.weights[:count].cpu(), expected.weights)


@pytest.mark.gpu
def test_cuda_graph_draws_a_new_subset_at_each_replay():
    p = probabilities(50_000)
    static_p, epoch = p.cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    sample(static_p, seed=12, epoch=epoch, capacity=40_000)  # loads the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(static_p, seed=12, epoch=epoch, capacity=40_000)
        epoch += 1
    for replay in range(4):
        if replay == 2:
            p = probabilities(50_000, seed=1)
            static_p.copy_(p)
        graph.replay()
        indices, weights = oracle(p, 12, replay)
        assert drawn.count.item() == len(indices)
        assert_same_bits(
            Sample(drawn.indices[: len(indices)], drawn.weights[: len(indices)], drawn.count), indices, weights
        )
        assert (drawn.indices[len(indices) :] == -1).all() and (drawn.weights[len(indices) :] == 0).all()


@pytest.mark.gpu
def test_cuda_with_capacity_does_not_wait_for_the_host():
    p, epoch = probabilities(50_000).cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sample(p, seed=0, capacity=30_000)
        sample(p, seed=0, epoch=epoch, capacity=30_000)
        with pytest.raises(RuntimeError, match="synchroniz"):  # the mode sees what waits
            sample(p, seed=0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("value", [math.nan, -0.5, 1.5])
def test_cuda_with_capacity_marks_a_wrong_p_by_a_count_of_minus_one(value):
    p = torch.full((10_000,), 0.5, device="cuda")
    p[9_999] = value
    drawn = sample(p, seed=0, capacity=8_000)
    assert drawn.count.item() == -1
    assert (drawn.indices == -1).all() and (drawn.weights == 0).all()


@pytest.mark.gpu
def test_cuda_runs_on_the_current_stream():
    p = torch.zeros(20_000_000, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        p.fill_(1.0)  # seen by the draw only if that waits for this stream
        drawn = sample(p, seed=0)
    torch.cuda.current_stream().wait_stream(stream)
    assert drawn.count.item() == p.numel()


@pytest.mark.gpu
def test_cuda_epoch_tensor_has_to_be_on_the_device():
    with pytest.raises(ValueError, match=r"epoch must be on p's device cuda:0, got cpu; pass epoch\.to"):
        sample(torch.ones(3, device="cuda:0"), seed=0, epoch=torch.tensor(1))


@pytest.mark.gpu
def test_cuda_leaves_the_current_device_alone():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = probabilities(10_000)
    before = torch.cuda.current_device()
    for index in range(2):
        assert_same_bits(sample(p.to(f"cuda:{index}"), seed=1), *oracle(p, 1))
        assert torch.cuda.current_device() == before


@pytest.mark.gpu
@pytest.mark.slow
def test_cuda_reaches_two_to_the_31():
    n = 2**31
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip("needs 20 GiB of free GPU memory")
    p = torch.zeros(n, device="cuda")
    p[-1000:] = 1.0
    p[5] = 1.0
    drawn = sample(p, seed=3, capacity=2000)
    assert drawn.count.item() == 1001
    assert drawn.indices[:1001].tolist() == [5, *range(n - 1000, n)]
    p.fill_(1.0)  # the largest sum of thresholds there is, 2^63
    drawn = sample(p, seed=3, capacity=10)
    assert drawn.count.item() == n and drawn.indices.tolist() == list(range(10)) and (drawn.weights == 1).all()


# --- tensors without memory -------------------------------------------------------------------------------------------

NO_MEMORY = r"has no memory, which sample\(\) works on: .*call sample\(\) outside of it, on plain tensors"


@pytest.mark.parametrize("capacity", [None, 4])
def test_fake_tensors_are_refused(device, capacity):
    """Ours and what is made on the way: an error, not the end of the process."""
    mode, real = FakeTensorMode(), torch.rand(7, device=device)
    fake, epoch = mode.from_tensor(real), mode.from_tensor(torch.tensor(3, device=device))
    with pytest.raises(RuntimeError, match=f"^p {NO_MEMORY}"):
        sample(fake, seed=1, capacity=capacity)
    with pytest.raises(RuntimeError, match=f"^epoch {NO_MEMORY}"):
        sample(real, seed=1, epoch=epoch, capacity=capacity)
    with mode:
        with pytest.raises(RuntimeError, match=f"^p {NO_MEMORY}"):
            sample(fake, seed=1, capacity=capacity)
        with pytest.raises(RuntimeError, match=f"^a new tensor {NO_MEMORY}"):
            sample(real, seed=1, capacity=capacity)


@pytest.mark.parametrize("transform", [torch.func.functionalize, torch.vmap, torch.func.grad])
def test_transforms_are_refused(device, transform):
    real = torch.rand(2, 7, device=device)
    with pytest.raises(RuntimeError, match=f"^p {NO_MEMORY}"):
        transform(lambda p: sample(p.flatten()[:7], seed=1, capacity=4).weights.sum())(real)
    if transform is torch.func.functionalize:
        with pytest.raises(RuntimeError, match=f"^a new tensor {NO_MEMORY}"):
            transform(lambda _: sample(real[0], seed=1, capacity=4).weights)(real)


def test_probabilities_of_fake_and_transformed_tensors(device):
    """These need no memory: the path of torch operations."""
    scores = torch.rand(9, device=device)
    with FakeTensorMode() as mode:
        p = inclusion_probabilities(mode.from_tensor(scores), 3.0)
    assert (p.shape, p.dtype, p.device) == (scores.shape, torch.float32, scores.device)
    functional = torch.func.functionalize(lambda s: inclusion_probabilities(s, 3.0))
    torch.testing.assert_close(functional(scores), inclusion_probabilities(scores, 3.0))


def test_draws_inside_of_modes_that_keep_memory(device):
    p = torch.rand(50, device=device)
    with FlopCounterMode(display=False):
        drawn = sample(p, seed=2)
    assert_same_bits(drawn, *oracle(p, 2))


def test_compiled_in_pieces_the_native_code_keeps_its_memory():
    """torch.compile breaks the graph at native calls, and its pieces drop what is not named again."""
    p = torch.full((10_000,), 0.3)
    drawn = torch.compile(lambda p: sample(p, seed=3, capacity=5_000).indices * 2, backend="aot_eager")(p)
    assert torch.equal(drawn, sample(p, seed=3, capacity=5_000).indices * 2)
