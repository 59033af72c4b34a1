"""Drawn examples become batches of one size, and none is lost or trained twice."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sadp_fast.prune.batching import Drawn, pack, shuffled


def drawn(indices) -> Drawn:
    indices = torch.as_tensor(list(indices), dtype=torch.int64)
    return Drawn(indices, indices.float() + 0.5)  # a weight that tells whose it is


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 17),
    pad=st.booleans(),
    seed=st.integers(0, 2**40),
)
def test_every_drawn_example_is_trained_once(sizes, batch_size, pad, seed):
    carried = drawn([])
    trained: list[tuple[int, float]] = []
    expected: list[tuple[int, float]] = []
    start = 0
    for epoch, size in enumerate(sizes):
        epoch_draw = drawn(range(start, start + size))  # disjoint epochs, so that an example's fate is visible
        start += size
        expected += [(i, i + 0.5) for i in epoch_draw.indices.tolist()]
        last = epoch == len(sizes) - 1
        batches, carried = pack(shuffled(epoch_draw, seed=seed, epoch=epoch), carried, batch_size, pad=pad or last)
        assert batches.indices.shape == batches.weights.shape
        assert batches.indices.shape[1] == batch_size
        assert batches.indices.shape[0] >= 1
        assert 0 <= batches.padding < batch_size
        weights = batches.weights.flatten()
        real = weights.shape[0] - batches.padding
        assert (weights[real:] == 0).all() and (weights[:real] > 0).all()
        trained += zip(batches.indices.flatten()[:real].tolist(), weights[:real].tolist(), strict=True)
        assert carried.indices.shape[0] < batch_size
        if pad or last:
            assert carried.indices.shape[0] == 0
    assert sorted(trained) == expected


def test_carried_examples_come_first_and_do_not_meet_their_double():
    batches, rest = pack(drawn([1, 2, 3, 4, 5, 6, 7]), drawn([2, 7]), 4, pad=False)
    first = batches.indices[0].tolist()
    assert first[:2] == [2, 7]
    assert len(set(first)) == 4
    assert sorted(batches.indices.flatten().tolist() + rest.indices.tolist()) == [1, 2, 2, 3, 4, 5, 6, 7, 7]


def test_order_depends_on_seed_and_epoch_alone(device):
    base = drawn(range(1000))
    on_device = Drawn(*(t.to(device) for t in base))
    order = shuffled(on_device, seed=3, epoch=5)
    assert order.indices.device.type == torch.device(device).type
    assert torch.equal(order.indices.cpu(), shuffled(base, seed=3, epoch=5).indices)
    assert torch.equal(order.weights.cpu(), order.indices.cpu() + 0.5)
    assert torch.equal(order.indices.sort().values.cpu(), base.indices)
    assert not torch.equal(order.indices.cpu(), shuffled(base, seed=3, epoch=6).indices)
    assert not torch.equal(order.indices.cpu(), shuffled(base, seed=4, epoch=5).indices)
    assert not torch.equal(order.indices.cpu(), base.indices)
