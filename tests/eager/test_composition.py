"""Other people's hooks, transforms and compilers around and inside LMS keep working."""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eviction import evict, gradients, leaves, open_wide
from sessions import (
    bits,
    new_session,
    open_lms,
    outcome,
    plain_peak,
    plain_step,
    run_plain,
)
from small_networks import NETWORKS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchlms


def hidden(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x @ w)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_inside(reentrant: bool, spill_dir: Path) -> None:
    def block(h: Tensor, w: Tensor) -> Tensor:
        return F.dropout((h @ w).sigmoid(), 0.3) @ w

    def checkpointed(x: Tensor, w: Tensor) -> Tensor:
        h = hidden(x, w).exp()
        h = checkpoint(block, h, w, use_reentrant=reentrant)
        return checkpoint(block, h.sin(), w, use_reentrant=reentrant).cos()

    def train(lms: torchlms.LMS | None = None) -> list[str]:
        x, w = leaves()
        out = checkpointed(x, w)
        assert lms is None or evict(lms) > 0
        out.sum().backward()  # the reentrant form knows no autograd.grad
        assert x.grad is not None
        assert w.grad is not None
        return [bits(out), bits(x.grad), bits(w.grad), bits(torch.get_rng_state())]

    plain = train()
    with open_wide(spill_dir) as lms:
        assert train(lms) == plain


def test_the_users_own_saved_tensor_hooks_inside(spill_dir: Path) -> None:
    """Theirs are innermost, so what is saved under them is theirs and no business of ours."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor * 1

    def nested(x: Tensor, w: Tensor) -> Tensor:
        h = hidden(x, w).exp()
        with torch.autograd.graph.save_on_cpu():
            h = (h @ w).sigmoid()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            h = h.sin().cos()
        return h.exp()

    plain, _ = gradients(nested)
    theirs = len(packed)
    with open_wide(spill_dir) as lms:
        moved, away = gradients(nested, lms)
    assert moved == plain
    assert len(packed) == 2 * theirs
    assert away > 0


def test_lms_inside_the_users_hooks(spill_dir: Path) -> None:
    with torch.autograd.graph.save_on_cpu():
        with open_wide(spill_dir) as lms:
            moved, away = gradients(lambda x, w: hidden(x, w).exp(), lms)
        after, _ = gradients(lambda x, w: hidden(x, w).exp())
    assert moved == after == gradients(lambda x, w: hidden(x, w).exp())[0]
    assert away > 0


def test_a_dispatch_mode_outside_sees_every_op(spill_dir: Path) -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    def run(lms: Any) -> list[str]:
        with Count() as count:
            x, w = leaves()
            with lms:
                hidden(x, w).exp().sum().backward()
        return count.names

    def counted(names: list[str]) -> list[str]:
        return [name for name in names if name != "aten.detach.default"]  # autograd's own, for saved results

    plain = counted(run(nullcontext()))
    assert counted(run(open_wide(spill_dir))) == plain
    assert "aten.tanh_backward.default" in plain


def test_func_transforms(spill_dir: Path) -> None:
    """``torch.func.grad`` refuses to run under anybody's saved-tensor hooks, and says so itself."""

    def energy(w: Tensor, x: Tensor) -> Tensor:
        return hidden(x, w).exp().sum()

    x, w = leaves()
    plain = torch.func.grad(energy)(w.detach(), x.detach())
    with open_wide(spill_dir) as lms:
        with pytest.raises(RuntimeError, match="saved tensor hooks"):
            torch.func.grad(energy)(w.detach(), x.detach())
        assert gradients(lambda x, w: hidden(x, w).exp(), lms)[1] > 0  # nothing is broken by that
    assert bits(torch.func.grad(energy)(w.detach(), x.detach())) == bits(plain)


def test_vmap_and_jvp(spill_dir: Path) -> None:
    x, w = leaves()
    x, w = x.detach(), w.detach()

    def both() -> tuple[str, str]:
        _, tangent = torch.func.jvp(lambda w: hidden(x, w), (w,), (w,))
        return bits(torch.func.vmap(hidden, (0, None))(x[:, None], w)), bits(tangent)

    plain = both()
    with open_wide(spill_dir):
        assert both() == plain


def test_tensor_hooks_retained_gradients_and_anomaly_mode(spill_dir: Path) -> None:
    seen: list[str] = []

    def hooked(x: Tensor, w: Tensor) -> Tensor:
        h = hidden(x, w)
        h.register_hook(lambda grad: seen.append(bits(grad)))
        h.retain_grad()
        y = h.exp()
        y.register_hook(lambda grad: grad * 2)
        return y

    def train(lms: torch.nn.Module | None = None) -> list[str]:
        with torch.autograd.detect_anomaly(check_nan=True):
            return gradients(hooked, lms)[0]  # type: ignore[arg-type]

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        plain = train()
    with open_wide(spill_dir) as lms, pytest.warns(UserWarning, match="Anomaly Detection"):
        assert train(lms) == plain  # type: ignore[arg-type]
    assert seen[0] == seen[1]


def test_copies_and_files_of_a_model_made_inside(spill_dir: Path) -> None:
    network = NETWORKS["mlp"]
    budget = int(0.6 * plain_peak(network))
    session = new_session(network)
    with open_lms(session, budget, spill_dir):
        for step in range(6):
            plain_step(session, step)
            twin = copy.deepcopy(session.model)
            buffer = io.BytesIO()
            torch.save([session.model.state_dict(), session.optimizer.state_dict()], buffer)
            buffer.seek(0)
            model_state, optimizer_state = torch.load(buffer)
            session.model.load_state_dict(model_state)
            session.optimizer.load_state_dict(optimizer_state)
            for one, other in zip(twin.parameters(), session.model.parameters(), strict=True):
                assert bits(one) == bits(other)
    assert outcome(session).differences(run_plain(network)) == []
