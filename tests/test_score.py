"""The pure score functions against hand-written formulas."""

import math

import pytest
import torch
from torch import nn

from sadp_fast.score import el2n_score, patch_multiplicity, spike_aware_score


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
    torch.testing.assert_close(el2n_score(output, torch.eye(5)[target]), expected)
