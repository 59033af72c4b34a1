"""The pure score functions against hand-written formulas."""

import math

import pytest
import torch
from torch import nn

from sadp_fast.prune.baselines import el2n_score
from sadp_fast.statistics.score import patch_multiplicity, spike_aware_score


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Linear(3, 5), 1),
        (nn.Conv2d(2, 4, 3), 9),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1), 4),
        (nn.Conv2d(2, 4, 1, stride=2), 1),
        (nn.Conv2d(4, 4, 7, stride=2, padding=3, groups=2), 16),
        (nn.Conv2d(2, 4, 3, dilation=2), 9),
        (nn.Conv2d(2, 4, 3, dilation=2, stride=2), 9),
        (nn.Conv2d(2, 4, 3, dilation=2, stride=4), 4),
        (nn.Conv1d(2, 4, 5, stride=3), 2),
        (nn.Conv3d(2, 4, (3, 1, 5), stride=(2, 2, 1)), 10),
    ],
)
def test_patch_multiplicity(layer, expected):
    assert patch_multiplicity(layer) == expected


@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_patch_multiplicity_is_the_largest_number_of_patches_of_one_element(kernel, stride, dilation):
    layer = nn.Conv1d(1, 1, kernel, stride=stride, dilation=dilation)
    patches = nn.functional.unfold(
        torch.eye(40).view(40, 1, 1, 40), (1, kernel), dilation=(1, dilation), stride=(1, stride)
    )
    assert patches.sum((1, 2)).max() == patch_multiplicity(layer)


@pytest.mark.parametrize("mode", ["replicate", "reflect", "circular"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("padding", [0, 1, 2, 3])
def test_padding_that_repeats_elements_adds_their_copies(mode, kernel, stride, dilation, padding):
    """Never fewer than there are, in inputs of any length; and as many for the most usual convolution."""
    layer = nn.Conv1d(1, 1, kernel, stride=stride, dilation=dilation, padding=padding, padding_mode=mode)
    most = 0
    for length in range(max(2, padding + 1), 24):
        padded = nn.functional.pad(torch.eye(length)[:, None], (padding, padding), mode=mode)[:, :, None]
        if padded.shape[-1] > dilation * (kernel - 1):
            patches = nn.functional.unfold(padded, (1, kernel), dilation=(1, dilation), stride=(1, stride))
            most = max(most, int(patches.sum((1, 2)).max()))
    assert most <= patch_multiplicity(layer)
    if (kernel, stride, dilation, padding) == (3, 1, 1, 1) and mode != "reflect":
        assert most == patch_multiplicity(layer)


def test_spike_aware_score_is_the_root_of_the_summed_products(device):
    counts = torch.tensor([[3, 0, 7], [2, 5, 1]], device=device)
    deltas = torch.tensor([[0.5, 2.0, 1.0], [0.25, 1.0, 0.0]], device=device)
    multiplicity = torch.tensor([9.0, 1.0], device=device)
    expected = [math.sqrt(9 * 3 * 0.5 + 2 * 0.25), math.sqrt(5 * 1.0), math.sqrt(9 * 7)]
    torch.testing.assert_close(
        spike_aware_score(counts, deltas, multiplicity).cpu(), torch.tensor(expected), rtol=1e-6, atol=0
    )


def test_spike_aware_score_survives_a_grad_scaler():
    big = spike_aware_score(torch.tensor([[2**30]]), torch.tensor([[1e32]]), torch.tensor([9.0]))
    assert torch.isfinite(big).all()
    torch.testing.assert_close(big, torch.tensor([3 * 2**15 * 1e16]), rtol=1e-5, atol=0)


def test_el2n():
    output = torch.randn(6, 5)
    target = torch.randint(5, (6,))
    expected = (output.softmax(1) - torch.eye(5)[target]).norm(dim=1)
    torch.testing.assert_close(el2n_score(output, target), expected)
    torch.testing.assert_close(el2n_score(output, target.byte()), expected)
    torch.testing.assert_close(el2n_score(output, torch.eye(5)[target]), expected)
