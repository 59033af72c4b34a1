"""Two ranks train as one: the same draws, disjoint shares, the same scores and the same steps.

Draws and scores are compared on weights that stay (a learning rate of 0): where they move, a rounding can flip a spike
sooner or later, and one process alone then trains another network. What moves is compared for one epoch on all data,
and between the ranks for all epochs.
"""

import os
import socket

import pytest
import torch
from torch import nn

import sadp_fast
from sadp_fast import SADP, LIFNode

N, BATCH, EPOCHS, T = 61, 8, 5, 3


def model_and_data(device):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10), LIFNode(step_mode="m"), nn.Linear(10, 3))
    x, y = torch.randn(N, 6) * 2, torch.randint(3, (N,))
    return body.to(device), x.to(device), y.to(device)


def train(model, body, x, y, batch_size, lr, epochs=EPOCHS):
    """Returns the index rows of each epoch, scores [N], the count of examples, and the parameters."""
    sadp = SADP(body, N, epochs=EPOCHS, seed=5, weights="unbiased")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rows = []
    for _ in range(epochs):
        epoch = []
        for row in sadp.batches(batch_size):
            assert row.is_contiguous()  # kernels read it
            epoch.append(row)
            loss = sadp.loss(nn.CrossEntropyLoss(), model(x[row].expand(T, -1, -1)).mean(0), y[row])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sadp_fast.reset(body)
        rows.append(torch.stack(epoch).cpu())
    return rows, sadp.scores.cpu(), int(sadp.examples_trained), [p.detach().cpu() for p in body.parameters()]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def worker(rank, port, folder, backend, settings):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend, rank=rank, world_size=2)
    results = []
    for setting in settings:
        body, x, y = model_and_data(device)
        model = nn.parallel.DistributedDataParallel(body)
        results.append(train(model, body, x, y, BATCH // 2, **setting))
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["gloo", pytest.param("nccl", marks=pytest.mark.gpu)])
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_ranks_train_as_one(backend, tmp_path):
    if backend == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    settings = {"lr": 0.0}, {"lr": 0.1, "epochs": 1}, {"lr": 0.1}
    torch.multiprocessing.spawn(worker, (free_port(), str(tmp_path), backend, settings), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one[1], other[1], rtol=0, atol=0, equal_nan=True)  # scores, to the bit
        assert one[2] == other[2]
        assert all(torch.equal(a, b) for a, b in zip(one[3], other[3], strict=True))
        for a, b in zip(one[0], other[0], strict=True):
            assert a.shape == b.shape and a.shape[1] == BATCH // 2
    for one, other, setting in zip(first[:2], second[:2], settings[:2], strict=True):
        body, x, y = model_and_data("cuda" if backend == "nccl" else "cpu")
        alone = train(body, body, x, y, BATCH, **setting)
        for a, b, both in zip(one[0], other[0], alone[0], strict=True):
            assert torch.equal(torch.cat((a, b), 1).sort(1).values, both.sort(1).values)
        assert one[2] == alone[2]
        for a, b in zip(one[3], alone[3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        if setting["lr"] == 0:  # an example drawn twice in an epoch: here its scores are the same
            assert len({len(rows) for rows in alone[0]}) > 1, "nothing was pruned"
            assert one[1].isfinite().all()
            torch.testing.assert_close(one[1], alone[1], rtol=1e-4, atol=1e-6)


def left_early(rank, port, folder):
    """Each rank leaves an epoch early, saves its own state, and goes on from it; then full data by torch's sampler."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    body, x, y = model_and_data("cpu")
    sadp = SADP(body, N, epochs=8, seed=5)
    states = []
    for epoch in range(3):
        for number, row in enumerate(sadp.batches(BATCH // 2)):
            sadp.loss(nn.CrossEntropyLoss(), body(x[row].expand(T, -1, -1)).mean(0), y[row]).backward()
            sadp_fast.reset(body)
            if epoch == 1 and number == 2:
                states.append(sadp.state_dict())
                break
        states.append(sadp.state_dict())
    probabilities = []
    for state in states:
        other = SADP(body, N, epochs=8, seed=5)
        other.load_state_dict(state)
        count = len(list(other.batches(BATCH // 2)))
        probabilities.append((count, other.probabilities))
    full = SADP(body, N, epochs=2, prune_ratio=0.0)
    data = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(data, 4, sampler=torch.utils.data.DistributedSampler(data))
    list(full.loader(loader))
    torch.save((probabilities, full.examples_trained), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_ranks_that_save_their_own_states_go_on_alike(tmp_path):
    torch.multiprocessing.spawn(left_early, (free_port(), str(tmp_path)), nprocs=2)
    (first, trained), (second, also) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert trained == also == N  # by all ranks together
    assert len(first) == 4
    for (count, p), (other_count, q) in zip(first, second, strict=True):
        assert count == other_count and torch.equal(p, q)
    assert any(p.unique().numel() > 2 for _, p in first), "nothing was pruned by scores"
