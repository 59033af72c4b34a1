"""Two ranks train as one: the same draws, disjoint shares, and the same scores afterwards."""

import os
import socket

import pytest
import torch
from torch import nn

import sadp_fast
from sadp_fast import SADP, LIFNode

N, BATCH, EPOCHS, T = 61, 8, 5, 3


def model_and_data():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 10), LIFNode(step_mode="m"), nn.Linear(10, 3))
    return body, torch.randn(N, 6) * 2, torch.randint(3, (N,))


def train(model, body, x, y, batch_size):
    sadp = SADP(body, N, epochs=EPOCHS, seed=5, weights="unbiased")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = []
    for _ in range(EPOCHS):
        epoch = []
        for row in sadp.batches(batch_size):
            epoch.append(row)
            loss = sadp.loss(nn.CrossEntropyLoss(), model(x[row].expand(T, -1, -1)).mean(0), y[row])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sadp_fast.reset(body)
        rows.append(torch.stack(epoch))
    return rows, sadp.scores, sadp.examples_trained, [p.detach() for p in body.parameters()]


def worker(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    body, x, y = model_and_data()
    model = nn.parallel.DistributedDataParallel(body)
    torch.save(train(model, body, x, y, BATCH // 2), os.path.join(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_ranks_train_as_one(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    body, x, y = model_and_data()
    alone = train(body, body, x, y, BATCH)
    for a, b, both in zip(first[0], second[0], alone[0], strict=True):
        assert a.shape[1] == b.shape[1] == BATCH // 2
        assert torch.equal(torch.cat((a, b), 1).sort(1).values, both.sort(1).values)
    assert torch.equal(first[1], second[1])  # scores, to the bit
    torch.testing.assert_close(first[1], alone[1], rtol=1e-3, atol=1e-6)
    assert first[2] == second[2] == alone[2]
    for a, b in zip(first[3], alone[3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
