"""Mixup: what it mixes and by which shares, and that training does it to inputs and targets alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train import CONFIG, StopAfter, colour_data, without_seconds
from torch.distributions import Beta

from sadp_fast.lab import augmentation, train
from sadp_fast.lab.augmentation import draw_mixup, mixup
from sadp_fast.lab.train import Trainer


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 5, 4), (7,)])
def test_each_example_is_mixed_with_the_one_before_it(dtype, shape, device):
    torch.manual_seed(0)
    x, labels = torch.randn(6, *shape, device=device).to(dtype), torch.tensor([2, 0, 1, 1, 3, 0], device=device)
    share = draw_mixup(6, 0.7, x.device)
    mixed, targets = mixup(x, labels, share, 4)
    assert mixed.dtype == dtype and targets.dtype == torch.float32 and targets.shape == (6, 4)
    for i in range(6):
        s = share[i].to(dtype).double()  # one share, as it is rounded, for inputs and targets
        expected = s * x[i].double() + (1 - s) * x[i - 1].double()
        error = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
        torch.testing.assert_close(mixed[i].double(), expected, rtol=error, atol=error)
        target = torch.zeros(4, dtype=torch.float64, device=device)
        target[labels[i]] += s
        target[labels[i - 1]] += 1 - s
        torch.testing.assert_close(targets[i].double(), target, rtol=1e-6, atol=1e-7)


def test_the_memory_format_stays(device):
    x = torch.randn(4, 3, 8, 8, device=device).to(memory_format=torch.channels_last)
    mixed, _ = mixup(x, torch.zeros(4, dtype=torch.int64, device=device), torch.full((4,), 0.75, device=device), 2)
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("alpha", [0.01, 0.03, 0.2, 0.5, 1.0, 8.0, 100.0])
def test_shares_are_those_of_a_beta_distribution(alpha, device):
    """Their spread about 1/2, which is the same for s and 1 - s: 1 / (4 (2 alpha + 1)) is Beta's variance."""
    torch.manual_seed(1)
    share = draw_mixup(200_000, alpha, torch.device(device)).double()
    assert share.min() >= 0.5 and share.max() <= 1 and share.isfinite().all()
    variance = 1 / (4 * (2 * alpha + 1))
    assert (share - 0.5).square().mean().item() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.2])
def test_shares_of_small_alphas_are_those_that_numpy_draws(alpha, device):
    """Mostly 1, and never exactly 1/2, which both of a share's gamma variables being 0 would make it."""
    torch.manual_seed(2)
    share = draw_mixup(200_000, alpha, torch.device(device)).double().cpu().numpy()
    other = np.random.default_rng(0).beta(alpha, alpha, 200_000)
    other = np.maximum(other, 1 - other)
    assert (share == 0.5).mean() < 1e-4
    for limit in (0.6, 0.9, 0.999):
        expected = (other > limit).mean()
        # Five standard deviations of the difference of two such shares.
        assert abs((share > limit).mean() - expected) < 5 * (2 * expected * (1 - expected) / 200_000) ** 0.5
    assert share.mean() == pytest.approx(other.mean(), abs=0.002)


def test_shares_are_drawn_in_float64(monkeypatch, device):
    """A GPU draws in the concentrations' own precision, the CPU always in this one."""
    drawn = []
    monkeypatch.setattr(augmentation, "Beta", lambda a, b, **options: drawn.append((a.dtype, b.dtype)) or Beta(a, b))
    assert draw_mixup(5, 0.01, torch.device(device)).dtype == torch.float32
    assert drawn == [(torch.float64, torch.float64)]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("method", ["full", "sadp", "loss", "el2n", "infobatch", "grad_norm"])
def test_training_mixes_inputs_and_targets(monkeypatch, method, alpha):
    seen, mixed = [], []

    def record(*args):
        mixed.append((args, mixup(*args)))
        return mixed[-1][1]

    monkeypatch.setattr(train, "mixup", record)
    trainer = Trainer(replace(CONFIG, mixup=alpha).of(method), colour_data())
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    criterion, targets = trainer.criterion, []
    monkeypatch.setattr(criterion, "forward", lambda output, target: targets.append(target) or output.sum())
    trainer.sadp.loss = lambda criterion, output, target: criterion(output, target)
    batches = trainer.sadp.batches(16)
    index = next(batches)
    monkeypatch.setattr(train, "gradient_norms", lambda model, x, target, criterion: torch.rand(len(x)))
    trainer.step(index, 1e-3)
    batches.close()
    labels = trainer.data.train_labels[index]
    if alpha == 0:
        assert not mixed and torch.equal(targets[0], labels)
        return
    ((x, given, share, classes), (inputs, target)) = mixed[0]
    assert torch.equal(given, labels) and classes == 3 and len(x) == len(share) == 16
    assert seen[0] is inputs and targets[0] is target


@pytest.mark.parametrize("method", ["full", "sadp", "loss", "el2n", "infobatch", "grad_norm"])
def test_a_network_learns_and_resumes_with_it(tmp_path, method):
    config = replace(CONFIG, mixup=0.5, label_smoothing=0.1, epochs=8).of(method)
    whole = train.run(config, colour_data(), tmp_path / "whole").history
    with pytest.raises(KeyboardInterrupt):
        train.run(config, colour_data(), tmp_path / "cut", [StopAfter(3)])
    resumed = train.run(config, colour_data(), tmp_path / "cut", resume=True).history
    assert without_seconds(whole) == without_seconds(resumed)
    assert whole[-1]["test_accuracy"] > 0.6
