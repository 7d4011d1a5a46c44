"""Loops by the types of the numbers that they save."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sessions import Session
from torch import Tensor, nn

from tests.matrix.passes import loss_of
from tests.matrix.row import Row
from tests.matrix.stack import WIDTH, stack, stack_of

SCALE = 2.0**40  # with which float16 gradients overflow


def here() -> str:
    """The kind of the default device."""
    return torch.get_default_device().type


def autocast(session: Session, step: int) -> None:
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad(set_to_none=True)
    with torch.autocast(here(), torch.bfloat16):
        loss = F.cross_entropy(session.model(inputs).float(), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def scaled(session: Session, step: int) -> None:
    """float16 with a scaler; the first step is skipped for its scale, the sixth for a bad batch."""
    scaler = session.keep("scaler", lambda: torch.amp.GradScaler(here(), SCALE, backoff_factor=2.0**-24))
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    with torch.autocast(here(), torch.float16):
        loss = F.cross_entropy(session.model(inputs).float(), target)
    if step == 5:
        loss = loss * float("inf")
    scaler.scale(loss).backward()
    scaler.unscale_(session.optimizer)
    torch.nn.utils.clip_grad_norm_(session.model.parameters(), 1.0)
    before = scaler.get_scale()
    scaler.step(session.optimizer)
    scaler.update()
    assert (scaler.get_scale() < before) is (step in (0, 5)), "no step was skipped where one should be"
    session.note(loss)


def pure_half(session: Session, step: int) -> None:
    """The whole network in bfloat16."""
    if step == 0:
        session.model.bfloat16()
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs.bfloat16()).float(), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def doubled(session: Session, step: int) -> None:
    if step == 0:
        session.model.double()
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs.double()), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def complex_numbers(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x)
    turned = spectrum * torch.exp(1j * spectrum.abs()) + torch.view_as_complex(
        torch.view_as_real(spectrum).tanh()
    )
    return torch.fft.irfft(turned.conj() * spectrum, n=WIDTH)


def integers(x: Tensor) -> Tensor:
    order = x.argsort(1)
    top, where = x.topk(8, 1)
    return x.gather(1, order).tanh().scatter_add(1, where, top.exp()) * F.one_hot(where[:, 0], WIDTH)


def masks(x: Tensor) -> Tensor:
    return torch.where(x > 0.1, x.exp(), x.square()).masked_fill(x > 1, 0.5) * (x < 3)


class Sparse(nn.Module):
    """A graph layer: its adjacency is sparse, and so is what autograd saves of it."""

    def __init__(self) -> None:
        super().__init__()
        self.adjacency = (torch.rand(WIDTH, WIDTH) < 0.2).float().to_sparse()

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, x.t().sigmoid()).t().tanh()


class Squeezed(torch.autograd.Function):
    """Saves its input in eight bits, as memory savers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(torch.quantize_per_tensor(x, 0.05, 0, torch.qint8))
        return x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (squeezed,) = ctx.saved_tensors
        y = squeezed.dequantize().sigmoid()
        return gradient * y * (1 - y)


def quantised(x: Tensor) -> Tensor:
    return Squeezed.apply(x).exp()  # type: ignore[no-any-return]


def fake_quantised(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127).tanh()


def ragged(session: Session, step: int) -> None:
    """A nested tensor inside: its parts pass through, what is around it moves."""
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    parts = torch.nested.nested_tensor_from_jagged(inputs, torch.tensor([0, 60, 200, 256]))
    loss = F.cross_entropy(session.model((parts * 2).values()), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def checked(session: Session, step: int) -> None:
    with torch.autograd.set_detect_anomaly(True):
        session.optimizer.zero_grad()
        loss = loss_of(session, step)
        loss.backward()
    session.optimizer.step()
    session.note(loss)


ROWS = [
    Row("autocast bfloat16", "forward under `torch.autocast`", autocast),
    Row("autocast float16", "with `GradScaler`, clipping, and two skipped steps", scaled),
    Row("bfloat16 throughout", "`model.bfloat16()`", pure_half, share=0.75),
    Row("float64 throughout", "`model.double()`", doubled),
    Row(
        "complex numbers",
        "FFT, complex exponential, conjugates, views as real",
        network=stack_of(complex_numbers),
    ),
    Row(
        "integers",
        "indices of `argsort`, `topk`, `gather`, `scatter_add`, `one_hot`",
        network=stack_of(integers),
    ),
    Row("masks", "`where`, `masked_fill`, comparisons", network=stack_of(masks)),
    Row(
        "sparse",
        "products with a sparse matrix; sparse tensors are left alone",
        network=stack("sparse", Sparse),
    ),
    Row("quantised", "eight-bit tensors saved; they are left alone", network=stack_of(quantised)),
    Row("fake quantisation", "quantisation-aware training", network=stack_of(fake_quantised)),
    Row("nested", "a jagged tensor on the way in; it is left alone", ragged),
]
