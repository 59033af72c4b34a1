"""The score's kernels against plain torch in float64."""

import pytest
import torch

from sadp_fast.ops.lif.reference import squared_norm_per_example
from sadp_fast.statistics.score import spike_aware_score

NAN = float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(4, 6, 10),
        lambda: torch.randn(1, 5, 3, 9, 8).to(memory_format=torch.contiguous_format),
        lambda: torch.randn(5, 8, 3, 3).to(memory_format=torch.channels_last).unsqueeze(0),
        lambda: torch.randn(6, 7).expand(3, 6, 7),  # what the mean over time hands back: the same at every step
        lambda: torch.randn(2, 3, 1500),
        lambda: torch.randn(5, 8, 11)[1:4, 2:7],  # examples of a larger tensor
        lambda: torch.randn(3, 4),
        lambda: torch.randn(1, 4, 1),
    ],
)
def test_energy_of_each_example(make, dtype, kernel_device):
    from sadp_fast.ops.score.op import write_energy

    with torch.device(kernel_device):
        t = make().to(dtype)
    expected = squared_norm_per_example(t.double()).sum(0)
    out = torch.full((t.shape[1],), NAN, device=kernel_device)
    assert write_energy(t, out, add=False)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=0)
    assert write_energy(t, out, add=True)
    torch.testing.assert_close(out.double(), 2 * expected, rtol=1e-5, atol=0)


def test_energy_of_other_tensors_is_left_to_torch(kernel_device):
    from sadp_fast.ops.score.op import write_energy

    out = torch.zeros(4, device=kernel_device)
    ones = torch.ones(2, 4, 6, device=kernel_device)
    for t in (ones.double(), ones[..., ::2], ones[..., :0], ones[:, :, :1].expand(2, 4, 3)):
        assert not write_energy(t, out, add=False)
    assert (out == 0).all()


def batch(examples, layers, rows, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    energies = torch.rand(rows, examples, generator=generator) * 10
    layer_rows = torch.randint(rows, (2, layers), generator=generator)
    multiplicity = torch.randint(1, 10, (layers,), generator=generator).float()
    weights = torch.rand(examples, generator=generator) + 0.5
    indices = torch.randperm(3 * examples, generator=generator)[:examples]
    energies = torch.nn.functional.pad(energies, (0, -examples % 4))[:, :examples]  # rows as EnergyTaps aligns them
    return [t.to(device) for t in (energies, layer_rows, multiplicity, weights, indices)]


def reference(energies, layer_rows, multiplicity, gradient, mean_factor, weights, indices, slots):
    """The definition, one example at a time, in float64."""
    energies, slots = energies.double(), slots.clone()
    found = {}
    for i, index in enumerate(indices.tolist()):
        weight = 1.0 if weights is None else weights[i].double().item()
        total = sum(
            multiplicity[k].double() * energies[a, i] * energies[d, i] for k, (a, d) in enumerate(layer_rows.T.tolist())
        )
        factor = abs(gradient.double().item()) * mean_factor * weight
        score = (total**0.5 / factor).item() if factor > 0 else NAN
        if score == score and score <= torch.finfo(torch.float32).max:
            found[index] = max(found.get(index, 0.0), score)
    for index, score in found.items():
        slots[index] = score
    return slots


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("examples", "layers", "rows"), [(128, 21, 43), (1, 1, 2), (70, 3, 5), (5, 40, 9)])
def test_scores_of_a_batch(examples, layers, rows, weighted, kernel_device):
    from sadp_fast.ops.score.op import update_scores

    energies, layer_rows, multiplicity, weights, indices = batch(examples, layers, rows, kernel_device)
    weights = weights if weighted else None
    slots = torch.full((3 * examples + 1,), NAN, device=kernel_device)
    gradient = torch.tensor(-1024.0, device=kernel_device)  # of a GradScaler, say
    arguments = (layer_rows, multiplicity, gradient, 1 / examples, weights, indices)
    expected = reference(energies, *arguments, slots)
    score = spike_aware_score(energies[layer_rows[0]], energies[layer_rows[1]], multiplicity)
    torch.testing.assert_close(
        score / (1024 / examples * (1 if weights is None else weights)), expected[indices], rtol=1e-5, atol=0
    )
    read = torch.zeros(rows, dtype=torch.bool).index_fill(0, layer_rows.flatten().cpu(), True)
    update_scores(energies, *arguments, slots)
    torch.testing.assert_close(slots, expected, rtol=1e-5, atol=0, equal_nan=True)
    # Energies are used up, so that what the next batch does not measure cannot pass for measured.
    assert torch.equal(energies.isnan().any(1).cpu(), read) and torch.equal(energies.isnan().all(1).cpu(), read)
    update_scores(energies, *arguments, slots)
    torch.testing.assert_close(slots, expected, rtol=1e-5, atol=0, equal_nan=True)


def test_scores_of_a_rank_of_several(kernel_device):
    """Whose indices and weights may be every other one of all ranks'."""
    from sadp_fast.ops.score.op import update_scores

    energies, layer_rows, multiplicity, weights, indices = batch(12, 3, 5, kernel_device)
    gradient, slots = torch.ones((), device=kernel_device), torch.full((37,), NAN, device=kernel_device)
    arguments = (layer_rows, multiplicity, gradient, 1.0, weights[1::2], indices[1::2])
    expected = reference(energies[:, :6], *arguments, slots)
    update_scores(energies[:, :6], *arguments, slots)
    torch.testing.assert_close(slots, expected, rtol=1e-5, atol=0, equal_nan=True)


def test_what_is_no_score_leaves_the_old_one(kernel_device):
    """Padding (weight 0), NaN, infinity; an example that occurs twice keeps the larger score, whatever the order."""
    from sadp_fast.ops.score.op import update_scores

    inf = float("inf")
    deltas = torch.tensor([4.0, NAN, inf, 9.0, 16.0, 0.0, 25.0, 1.0], device=kernel_device)
    weights = torch.tensor([0.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0], device=kernel_device)
    indices = torch.tensor([0, 1, 2, 3, 4, 5, 3, 3], device=kernel_device)
    rows = torch.tensor([[0], [1]], device=kernel_device)
    slots = torch.full((7,), 0.5, device=kernel_device)
    energies = torch.stack((torch.ones_like(deltas), deltas))
    one = torch.ones((), device=kernel_device)
    update_scores(energies, rows, one.view(1), one, 1.0, weights, indices, slots)
    assert slots.tolist() == [0.5, 0.5, 0.5, 5.0, 2.0, 0.0, 0.5]


def test_scores_are_averaged_with_the_old_ones(kernel_device):
    """momentum * old + (1 - momentum) * new; the new one alone where there is no old one; the larger of two rows."""
    from sadp_fast.ops.score.op import update_scores

    inf = float("inf")
    deltas = torch.tensor([4.0, 9.0, 16.0, inf, 25.0, 1.0], device=kernel_device)
    indices = torch.tensor([0, 1, 2, 3, 2, 2], device=kernel_device)
    rows = torch.tensor([[0], [1]], device=kernel_device)
    one = torch.ones((), device=kernel_device)
    for order in (torch.arange(6), torch.arange(6).flip(0)):
        slots = torch.tensor([6.0, NAN, 0.0, 7.0, 8.0], device=kernel_device)
        energies = torch.stack((torch.ones_like(deltas), deltas[order.to(kernel_device)]))
        update_scores(energies, rows, one.view(1), one, 1.0, None, indices[order.to(kernel_device)], slots, 0.75)
        assert slots.tolist() == [5.0, 3.0, 1.25, 7.0, 8.0]


def test_averages_of_rows_in_several_programs(kernel_device):
    """36 layers leave 16 examples a program: one that occurs in each of three is averaged with the same old score."""
    from sadp_fast.ops.score.op import update_scores

    layers, examples = 36, 48
    values = torch.arange(1.0, examples + 1, device=kernel_device)
    indices = torch.arange(examples, device=kernel_device)
    indices[[20, 40]] = 3
    rows = torch.tensor([[0], [1]], device=kernel_device).repeat(1, layers)
    slots = torch.full((examples + 1,), 100.0, device=kernel_device)
    energies = torch.stack((torch.ones_like(values), values.square() / layers))
    one = torch.ones((), device=kernel_device)
    update_scores(energies, rows, torch.ones(layers, device=kernel_device), one, 1.0, None, indices, slots, 0.5)
    expected = (100 + values) / 2
    expected[3] = (100 + 41) / 2
    expected[[20, 40]] = 100
    torch.testing.assert_close(slots[:-1], expected, rtol=1e-5, atol=0)


def test_large_energies_do_not_overflow(kernel_device):
    from sadp_fast.ops.score.op import update_scores

    energies = torch.tensor([[2.0**30], [1e32]], device=kernel_device)
    rows = torch.tensor([[0, 0], [1, 1]], device=kernel_device)
    slots = torch.full((2,), NAN, device=kernel_device)
    multiplicity = torch.tensor([9.0, 9.0], device=kernel_device)
    one = torch.ones((), device=kernel_device)
    update_scores(energies, rows, multiplicity, one, 1.0, None, torch.tensor([0], device=kernel_device), slots)
    assert slots[0].item() == pytest.approx(3 * 2**15 * 1e16 * 2**0.5, rel=1e-5)
