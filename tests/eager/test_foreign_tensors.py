"""Tensors that are not plain bytes here: other devices, other layouts, other classes, other owners."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eviction import SIDE, assert_same_gradients, evict, gradients, leaves, open_wide
from sessions import bits
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import torchlms


def hidden(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w)


def test_what_takes_no_memory_takes_no_budget(spill_dir: Path) -> None:
    """Models are made on the meta device first, and steps are tried with fake tensors, in large programs."""
    with torchlms.LMS(device="cpu", budget="1MiB", disk_dir=spill_dir) as lms:
        layer = nn.Linear(10_000, 10_000, device="meta")
        assert layer(torch.empty(5, 10_000, device="meta")).shape == (5, 10_000)
        with FakeTensorMode():
            fake = nn.Linear(10_000, 10_000)(torch.randn(7, 10_000)).relu()
        assert fake.shape == (7, 10_000)
        assert lms.stats()["peak_device_bytes"] < 1000
        with pytest.raises(torchlms.BudgetTooSmall):
            torch.ones(1 << 20)


def test_tensors_made_of_tensors_pass_through(spill_dir: Path) -> None:
    """They have no storage of their own to move; their detach is theirs."""

    def train() -> list[str]:
        torch.manual_seed(3)
        pair = TwoTensor(torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)).requires_grad_()
        x, w = leaves()
        for loss in ((pair @ pair).tanh().exp().sum(), (x @ w).tanh().exp().sum()):
            loss.backward()
        return [bits(item) for item in (pair.grad.a, pair.grad.b, x.grad, w.grad)]

    plain = train()
    with open_wide(spill_dir):
        assert train() == plain


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype.*:UserWarning")
def test_a_padded_encoder_in_evaluation(spill_dir: Path) -> None:
    """torch takes nested tensors there, without being asked."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    x, mask = torch.randn(4, 10, 32), torch.arange(10).expand(4, 10) > torch.tensor([[9], [4], [7], [2]])

    def evaluate() -> str:
        with torch.no_grad():
            return bits(encoder(x, src_key_padding_mask=mask))

    plain = evaluate()
    with open_wide(spill_dir):
        assert evaluate() == plain


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_nested_and_shared_and_mapped_tensors_pass_through(spill_dir: Path, tmp_path: Path) -> None:
    shared = torch.randn(SIDE, SIDE).share_memory_()
    mapped = torch.from_file(str(tmp_path / "mapped"), True, SIDE * SIDE).view(SIDE, SIDE)
    mapped.copy_(shared)
    borrowed = torch.from_numpy(shared.numpy().copy())

    def foreign(x: Tensor, w: Tensor) -> Tensor:
        h = hidden(x, w)
        ragged = torch.nested.nested_tensor([w[:3].detach(), w[:7].detach()], layout=torch.jagged)
        padded = torch.nested.nested_tensor([torch.ones(30, SIDE), torch.ones(9, SIDE)])
        total = (ragged * 2).values().sum() + sum(part.exp().mean() for part in F.linear(padded, w).unbind())
        return (h * shared + h * mapped.exp() + h * borrowed) * total

    plain, _ = gradients(foreign)
    with open_wide(spill_dir) as lms:
        x, w = leaves()
        out = foreign(x, w)
        assert evict(lms) > 0
        found = torch.autograd.grad(out.sum(), (x, w))
    assert [bits(item) for item in found] == plain[1:]


def test_sparse_tensors_pass_through(spill_dir: Path) -> None:
    def sparse(x: Tensor, w: Tensor) -> Tensor:
        matrix = torch.where(w > 0.1, w, 0).to_sparse()
        return torch.sparse.mm(matrix, x) + torch.sparse.softmax(matrix, 1).to_dense() @ x

    assert_same_gradients(sparse, spill_dir)


def test_an_embedding_with_sparse_gradients(spill_dir: Path) -> None:
    def train() -> list[str]:
        torch.manual_seed(3)
        embedding = nn.Embedding(100, SIDE, sparse=True)
        optimizer = torch.optim.SparseAdam(list(embedding.parameters()), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            embedding(torch.arange(step, step + 50).repeat(4)).tanh().exp().sum().backward()
            optimizer.step()
        return [bits(embedding.weight)]

    plain = train()
    rules = {"move_ops": ("*",), "min_bytes": 0}
    with torchlms.LMS(device="cpu", budget=300_000, disk_dir=spill_dir, rules=rules) as lms:
        assert train() == plain
        assert lms.stats()["bytes_out_per_step"] > 0
