"""Crop, flip, normalise, cut out: the kernel and the torch path against a loop over pixels, and against each other."""

import os

import pytest
import torch

from sadp_fast.lab import augmentation
from sadp_fast.lab.augmentation import crop_flip_normalise, draw_augmentation
from sadp_fast.ops.augment import reference as reference

SHAPES = [(3, 32, 32), (3, 7, 9), (1, 8, 8), (2, 1, 5), (3, 40, 30), (5, 2, 6, 4)]
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def example(shape, device="cpu", count=11, batch=6, seed=0, cutout=False):
    """images, index, draws, mean, std."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, *shape), dtype=torch.uint8, generator=generator)
    index = torch.randint(count, (batch,), generator=generator)
    mean = torch.rand(shape[-3], generator=generator) * 255
    std = torch.rand(shape[-3], generator=generator) * 60 + 20
    return [t.to(device) for t in (images, index, draw_augmentation(batch, generator, cutout), mean, std)]


def pixel_by_pixel(images, index, draws, mean, std, padding, cutout=0):
    """The definition, in float64: pad by mirroring, cut a window out, flip it, normalise it, hide a square."""
    *_, height, width = images.shape
    out = []
    for i, (u, v, flip, *centre) in zip(index.tolist(), draws.t().tolist(), strict=True):
        image = images[i].double()
        padded = torch.nn.functional.pad(image, [padding] * 4, mode="reflect")
        top, left = (int(draw * (2 * padding + 1)) for draw in (u, v))
        window = padded[..., top : top + height, left : left + width]
        if flip >= 0.5:
            window = window.flip(-1)
        x = (window - mean.double()[:, None, None]) / std.double()[:, None, None]
        if cutout:
            top, left = int(centre[0] * height) - cutout // 2, int(centre[1] * width) - cutout // 2
            for row in range(max(0, top), min(height, top + cutout)):
                for column in range(max(0, left), min(width, left + cutout)):
                    x[..., row, column] = 0
        out.append(x)
    return torch.stack(out)


def assert_same(out, expected):
    """The same bits; only the interpreter's conversion to bfloat16 truncates where the GPU's rounds."""
    assert (out.dtype, out.stride()) == (expected.dtype, expected.stride())
    truncated = INTERPRETED and out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=2**-7 if truncated else 0, atol=0)


@pytest.fixture
def kernel():
    pytest.importorskip("triton")
    from sadp_fast.ops.augment import op as augment

    return augment.crop_flip_normalise


@pytest.mark.parametrize(("padding", "cutout"), [(0, 0), (1, 0), (3, 0), (0, 1), (3, 4), (1, 5), (2, 11)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 7, 9), (1, 8, 8), (5, 2, 6, 4)])
def test_reference_is_the_definition(shape, padding, cutout, device):
    arguments = example(shape, device, batch=40, cutout=cutout > 0)
    out = crop_flip_normalise(*arguments, padding=padding, cutout=cutout)
    expected = pixel_by_pixel(*arguments, padding, cutout)
    assert out.shape == expected.shape == (40, *shape)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)


# Where the square lies in images of 5 x 6 pixels: its side, its centre, and what stays visible (#).
SQUARES = {
    "even": (2, (2, 3), ["######", "##..##", "##..##", "######", "######"]),
    "odd": (3, (2, 3), ["######", "##...#", "##...#", "##...#", "######"]),
    "one pixel": (1, (4, 0), ["######", "######", "######", "######", ".#####"]),
    "even, first corner": (2, (0, 0), [".#####", "######", "######", "######", "######"]),
    "odd, first corner": (3, (0, 0), ["..####", "..####", "######", "######", "######"]),
    "even, last corner": (2, (4, 5), ["######", "######", "######", "####..", "####.."]),
    "odd, last corner": (3, (4, 5), ["######", "######", "######", "####..", "####.."]),
    "upper right corner": (4, (0, 5), ["###...", "###...", "######", "######", "######"]),
    "larger than the image, at a corner": (8, (0, 0), ["....##", "....##", "....##", "....##", "######"]),
    "all of the image": (12, (2, 3), ["......"] * 5),
}


@pytest.mark.parametrize("flip", [0.0, 0.9])
@pytest.mark.parametrize("case", SQUARES)
def test_the_square_lies_where_it_is_drawn(case, flip, kernel, kernel_device):
    """In the image as the network sees it, whatever its crop and flip; the same in all channels and frames."""
    side, (row, column), visible = SQUARES[case]
    # One value all over, so that crop and flip do not show: (7 - 3) / 2 = 2.
    images = torch.full((1, 4, 3, 5, 6), 7, dtype=torch.uint8, device=kernel_device)
    mean, std = torch.full((3,), 3.0, device=kernel_device), torch.full((3,), 2.0, device=kernel_device)
    draws = torch.tensor([0.1, 0.9, flip, (row + 0.5) / 5, (column + 0.5) / 6], device=kernel_device)[:, None]
    expected = torch.tensor([[2.0 * (pixel == "#") for pixel in line] for line in visible], device=kernel_device)
    expected = expected.expand(1, 4, 3, 5, 6)
    assert torch.equal(crop_flip_normalise(images, None, draws, mean, std, cutout=side), expected)
    for layout in LAYOUTS:
        assert torch.equal(kernel(images, None, draws, mean, std, 4, side, torch.float32, layout), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernel_gives_the_bits_of_the_reference(shape, layout, kernel, kernel_device):
    images, index, draws, mean, std = example(shape, kernel_device, cutout=True)
    crops = draws[:3].contiguous()
    cases = [
        (index, crops, 0, torch.float32),
        (index.int(), crops, 0, torch.bfloat16),
        (index, None, 0, torch.float16),
        (None, crops, 0, torch.float32),
        (None, None, 0, torch.bfloat16),
        (index, draws, 4, torch.float16),
        (None, draws, 3, torch.float32),
        (index.int(), draws, 1, torch.bfloat16),
        (index, draws, 2**40, torch.float32),
    ]
    for chosen, random, cutout, dtype in cases:
        if chosen is None and random is not None:
            random = random.repeat(1, 2)[:, : len(images)].contiguous()
        options = (3, cutout, dtype, layout)
        out = kernel(images, chosen, random, mean, std, *options)
        expected = reference.crop_flip_normalise(images, chosen, random, mean, std, *options)
        assert_same(out, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_large_padding_is_mirrored_once_and_clamped(dtype, kernel, kernel_device):
    images, index, draws, mean, std = example((3, 4, 5), kernel_device)
    out = kernel(images, index, draws, mean, std, 9, 0, dtype, torch.channels_last)
    assert_same(out, reference.crop_flip_normalise(images, index, draws, mean, std, 9, 0, dtype, torch.channels_last))
    for size in (1, 2, 5):
        positions = reference.mirrored(torch.arange(-20, 20), size)
        assert positions.min() == 0 and positions.max() == size - 1


def test_extreme_draws(kernel, kernel_device):
    """The least and the greatest draw move the image by exactly the padding, and a square to the border pixels."""
    images, _, _, mean, std = example((3, 9, 9), kernel_device)
    greatest = 1 - 2**-24
    draws = torch.tensor([[0.0, greatest], [greatest, 0.0], [0.0, greatest]], device=kernel_device)
    centres = torch.tensor([[0.0, greatest], [greatest, greatest]], device=kernel_device)
    index = torch.tensor([2, 2], device=kernel_device)
    out = kernel(images, index, draws, mean, std, 4, 0, torch.float32, torch.contiguous_format)
    plain = reference.normalise(images[index], mean, std)
    assert torch.equal(out[0, :, 4:, :5], plain[0, :, :5, 4:])
    assert torch.equal(out[1].flip(-1)[:, :5, 4:], plain[1, :, 4:, :5])
    draws = torch.cat([draws, centres])
    cut = kernel(images, index, draws, mean, std, 4, 1, torch.float32, torch.contiguous_format)
    assert (cut != out).all(1).nonzero().tolist() == [[0, 0, 8], [1, 8, 8]]


def test_draws_are_those_of_the_generator():
    """Three rows without cutout, as ever: runs are repeated by their seeds."""
    for rows, cutout in ((3, False), (5, True)):
        drawn, expected = torch.Generator().manual_seed(4), torch.Generator().manual_seed(4)
        draws = draw_augmentation(7, drawn, cutout)
        assert torch.equal(draws, torch.rand(rows, 7, generator=expected))


def test_every_pixel_is_hidden_equally_often():
    count = 12000
    images = torch.full((1, 1, 3, 4), 9, dtype=torch.uint8)
    index = torch.zeros(count, dtype=torch.int64)
    draws = draw_augmentation(count, torch.Generator().manual_seed(0), cutout=True)
    out = crop_flip_normalise(images, index, draws, torch.zeros(1), torch.ones(1), cutout=1)
    hidden = out[:, 0] == 0
    assert (hidden.sum((1, 2)) == 1).all()
    often = hidden.sum(0)
    assert often.min() > 0.85 * count / 12 and often.max() < 1.15 * count / 12


def test_every_shift_and_flip_is_drawn_equally_often():
    padding, count = 1, 9000
    images = torch.arange(9, dtype=torch.uint8).view(1, 1, 3, 3)
    index = torch.zeros(count, dtype=torch.int64)
    draws = draw_augmentation(count, torch.Generator().manual_seed(0))
    out = crop_flip_normalise(images, index, draws, torch.zeros(1), torch.ones(1), padding=padding)
    shift = out[:, 0, 1, 1].long().bincount(minlength=9)
    flipped = (draws[2] >= 0.5).float().mean()
    assert shift.min() > 0.8 * count / 9 and shift.max() < 1.2 * count / 9
    assert 0.45 < flipped < 0.55


def test_an_index_out_of_range_is_never_read(kernel, kernel_device):
    images, _, _, mean, std = example((3, 8, 8), kernel_device)
    index = torch.tensor([1, -1, len(images), 2**40], device=kernel_device)
    out = kernel(images, index, None, mean, std, 4, 0, torch.float32, torch.channels_last)
    assert torch.equal(out[0], reference.normalise(images[1], mean, std))
    assert out[1:].isnan().all()
    draws = torch.full((5, len(index)), 0.5, device=kernel_device)
    out = kernel(images, index, draws, mean, std, 4, 16, torch.float32, torch.channels_last)
    assert (out[0] == 0).all() and out[1:].isnan().all()
    for wrong in (index[1:2], index[2:]):
        with pytest.raises(IndexError):
            crop_flip_normalise(images.cpu(), wrong.cpu(), None, mean.cpu(), std.cpu())


def test_an_empty_batch(kernel, kernel_device):
    images, index, draws, mean, std = example((3, 8, 8), kernel_device)
    out = kernel(images, index[:0], draws[:, :0], mean, std, 4, 0, torch.float32, torch.channels_last)
    assert out.shape == (0, 3, 8, 8)


def wrong(**changes):
    names = ("images", "index", "draws", "mean", "std")
    return lambda arguments: [changes.get(name, lambda t: t)(t) for name, t in zip(names, arguments, strict=True)]


WRONG = {
    "float images": (wrong(images=lambda t: t.float()), {}, "images must be contiguous uint8"),
    "strided images": (wrong(images=lambda t: t[..., ::2]), {}, "images must be contiguous uint8"),
    "float index": (wrong(index=lambda t: t.float()), {}, "index must be int64"),
    "draws of another batch": (wrong(draws=lambda t: t[:, 1:]), {}, r"draws must be float32 \[3, 6\]"),
    "double mean": (wrong(mean=lambda t: t.double()), {}, r"mean must be float32 \[3\]"),
    "std of another shape": (wrong(std=lambda t: t[:2]), {}, r"std must be float32 \[3\]"),
    "another device": (wrong(std=lambda t: t.to("meta")), {}, "std is on meta but images on cpu"),
    "five rows of draws without cutout": (
        wrong(draws=lambda t: torch.cat([t, t[:2]])),
        {},
        r"draws must be float32 \[3, 6\]",
    ),
    "cutout with three rows of draws": (
        wrong(),
        {"cutout": 2},
        r"cutout = 2 needs five rows of draws, got \(3, 6\): take",
    ),
    "cutout without draws": (
        wrong(draws=lambda t: None),
        {"cutout": 2},
        "cutout = 2 needs five rows of draws, got None",
    ),
    "negative cutout": (wrong(), {"cutout": -1}, "cutout must be at least 0, got -1"),
    "negative padding": (wrong(), {"padding": -1}, "padding must be at least 0"),
    "integer result": (wrong(), {"dtype": torch.int8}, "dtype must be one of"),
    "no such layout": (wrong(), {"memory_format": torch.channels_last_3d}, "memory_format of"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_clear_errors(case):
    change, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        crop_flip_normalise(*change(example((3, 8, 8))), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("cutout", [0, 7])
def test_a_replayed_graph_draws_anew(cutout):
    images, index, _, mean, std = example((3, 32, 32), "cuda")
    generator = torch.Generator("cuda").manual_seed(3)

    def step():
        draws = draw_augmentation(len(index), generator, cutout > 0)
        options = {"cutout": cutout, "memory_format": torch.channels_last}
        return draws, crop_flip_normalise(images, index, draws, mean, std, **options)

    step()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        draws, out = step()
    seen = []
    for _ in range(2):
        graph.replay()
        options = (4, cutout, torch.float32, torch.channels_last)
        expected = reference.crop_flip_normalise(images, index, draws, mean, std, *options)
        assert torch.equal(out, expected)
        seen.append(draws.clone())
    assert not torch.equal(*seen)


def test_dispatch_runs_no_kernel_on_the_cpu(monkeypatch):
    calls = []
    original = reference.crop_flip_normalise
    monkeypatch.setattr(augmentation.reference, "crop_flip_normalise", lambda *a: calls.append(1) or original(*a))
    crop_flip_normalise(*example((3, 8, 8)))
    assert calls == [1]
