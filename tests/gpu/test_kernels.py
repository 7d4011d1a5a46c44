"""Kernels whose two passes belong together: each of attention's, cuDNN's LSTM, dropout made again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import torchlms
from tests.gpu.networks import MIB
from tests.gpu.training import ALL_MOVE, DEVICE, Job, assert_as_plain, fresh, plain_runs, train
from torchlms.core.plan import Choice

pytestmark = pytest.mark.gpu
WIDTH, HEADS, LENGTH, BATCH = 256, 4, 512, 8


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class Attention(nn.Module):
    """Two layers of causal attention by one kernel, in bfloat16."""

    def __init__(self, kernel: SDPBackend) -> None:
        super().__init__()
        self.kernel = kernel
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        for project in self.projections:
            q, k, v = (
                part.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for part in project(x).chunk(3, -1)
            )
            with sdpa_kernel(self.kernel):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1)
            x = x + out.transpose(1, 2).reshape(x.shape)
        return self.head(x.mean(1))


def attend(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    del number
    x = torch.randn(BATCH, LENGTH, WIDTH, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        scores = model(x)
    loss = F.cross_entropy(scores.float(), torch.randint(0, 10, (BATCH,), device=DEVICE))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


KERNELS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
]


@pytest.mark.parametrize("kernel", KERNELS, ids=[kernel.name.lower() for kernel in KERNELS])
def test_each_kernel_of_attention(kernel: SDPBackend) -> None:
    job = Job(lambda: Attention(kernel), sgd, attend)
    try:
        model, optimizer = fresh(job)
        train(job, model, optimizer, 1)
    except RuntimeError as error:
        if "No available kernel" not in str(error):
            raise
        pytest.skip(f"{kernel.name} is not for this device")
    del model, optimizer
    assert_as_plain(job, **ALL_MOVE)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 128, num_layers=2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(torch.tanh(out).mean(1))


def recur(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    del number
    x = torch.randn(64, 50, 64, device=DEVICE)
    loss = F.cross_entropy(model(x), torch.randint(0, 10, (64,), device=DEVICE))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def test_the_recurrent_layer_of_cudnn() -> None:
    assert_as_plain(Job(Recurrent, sgd, recur), **ALL_MOVE)


def dropping_network() -> nn.Module:
    """Values of 32 MiB that are cheaper to make again than to move, each behind random numbers."""
    parts: list[nn.Module] = []
    for _ in range(8):
        parts += [nn.Linear(1024, 1024), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*parts, nn.Linear(1024, 10))


def drop(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> Tensor:
    del number
    x = torch.randn(8192, 1024, device=DEVICE)
    loss = F.cross_entropy(model(x), torch.randint(0, 10, (8192,), device=DEVICE))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def test_dropout_is_made_again_with_the_same_mask() -> None:
    job = Job(dropping_network, sgd, drop)
    plain = plain_runs(job, 10)
    model, optimizer = fresh(job)
    with torchlms.LMS(model, optimizer, budget=480 * MIB, recompute=True) as lms:
        ours = train(job, model, optimizer, 10)
        stats, plan, tape = lms.stats(), lms.plan, lms.tape
    assert ours.same_as(plain[0])
    assert stats["replayed_ops"] > 0
    assert plan is not None
    assert tape is not None
    dropped = {tape.values[move.value].op for move in plan.moves if move.choice is Choice.RECOMPUTE}
    assert any("dropout" in op for op in dropped), dropped
