"""What autograd saves comes back as it was: views, strides, types, and values changed in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eviction import SIDE, Function, assert_same_gradients, evict, leaves, open_wide
from sessions import bits
from torch import Tensor

import torchlms
from torchlms.core.tape import Phase


class Scaled(torch.autograd.Function):
    """Saves an input, an output, something of its own, and something that is no tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        inner = x.sin()
        y = inner * factor
        ctx.save_for_backward(x, y, inner, None)
        ctx.factor = factor
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        x, y, inner, nothing = ctx.saved_tensors
        assert nothing is None
        return grad * (x.cos() * ctx.factor + 0 * y + 0 * inner), None


def hidden(x: Tensor, w: Tensor) -> Tensor:
    """An activation that nobody but autograd will hold."""
    return torch.tanh(x @ w)


def slices(x: Tensor, w: Tensor) -> Tensor:
    h = hidden(x, w)
    return h[3:40:2, 1:60].exp() @ h[:37, 5:].t().exp()[:, :30].exp()


def chunks(x: Tensor, w: Tensor) -> Tensor:
    q, k, v = hidden(x.repeat(1, 3), w.repeat(3, 3)).chunk(3, dim=1)
    return (q * k.sigmoid()).t() @ v


def strided(x: Tensor, w: Tensor) -> Tensor:
    h = hidden(x, w)
    return h.as_strided((30, 20), (3, 65), 7).exp().square() + h.unfold(0, 30, 34)[0, :20].t().exp()


def channels_last(x: Tensor, w: Tensor) -> Tensor:
    image = hidden(x, w).view(4, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    return F.conv2d(image.relu(), w.view(-1)[: 8 * 16 * 9].view(8, 16, 3, 3), padding=1).square()


def in_place(x: Tensor, w: Tensor) -> Tensor:
    h = x @ w
    h.relu_()
    h = (h @ w).sigmoid_() @ w
    h = F.leaky_relu(h @ w, 0.2, inplace=True) @ w
    h[2:5].mul_(0.5)
    return h.tanh_()


def complex_numbers(x: Tensor, w: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(hidden(x, w))
    turned = spectrum * torch.exp(1j * torch.complex(w[:, :33], x[:, :33]))
    return torch.view_as_real(turned.conj() @ turned.t()).sin() + (turned @ turned.mH).abs()[..., None]


def integers(x: Tensor, w: Tensor) -> Tensor:
    h = hidden(x, w)
    order = torch.randint(0, SIDE, (SIDE, SIDE))
    top, where = h.topk(9, dim=1)
    return h.gather(1, order).exp() + F.embedding(order[:, 0], h).square() + (top * where).sum()


def masks(x: Tensor, w: Tensor) -> Tensor:
    h = hidden(x, w)
    mask = torch.rand(SIDE, SIDE) > 0.4
    return torch.where(mask, h.exp(), h.square()).masked_fill(~mask.t(), 0.5) * F.dropout(h, 0.3)


def half_precision(x: Tensor, w: Tensor) -> Tensor:
    low = hidden(x, w).bfloat16()
    return (low.exp() @ low.sigmoid()).double().square().to(torch.float16)


def attention(x: Tensor, w: Tensor) -> Tensor:
    q = hidden(x, w).view(2, 4, 32, 16)
    return F.scaled_dot_product_attention(q, q.sin(), q.cos(), dropout_p=0.0, is_causal=True)


def convolutions(x: Tensor, w: Tensor) -> Tensor:
    volume = hidden(x, w).view(1, 1, 16, 16, 16)
    up = F.conv_transpose3d(volume, w.view(-1)[:54].view(1, 2, 3, 3, 3), stride=2)
    return F.max_pool3d(F.batch_norm(up, None, None, training=True).relu_(), 2)


def linear_algebra(x: Tensor, w: Tensor) -> Tensor:
    h = hidden(x, w)
    square = h @ h.t() + 4 * torch.eye(SIDE)
    factor = torch.linalg.cholesky(square)
    return torch.linalg.solve(square, h) + torch.cholesky_solve(h, factor) + torch.linalg.inv(square)


def reductions(x: Tensor, w: Tensor) -> Tensor:
    h = hidden(x, w)
    return h.logsumexp(1) * h.softmax(0).prod(1) + h.norm(dim=1) + h.cumsum(0).var(1) + h.cumprod(1).amax(1)


def scatters(x: Tensor, w: Tensor) -> Tensor:
    h = hidden(x, w)
    index = torch.randint(0, SIDE, (SIDE, SIDE))
    spread = torch.zeros(SIDE, SIDE).scatter_add(1, index, h.exp())
    spread[index[0]] = h * h
    return torch.einsum("ij,kj,i->ik", spread, h, h[0])


def samples(x: Tensor, w: Tensor) -> Tensor:
    image = hidden(x, w).view(1, 1, SIDE, SIDE)
    bigger = F.interpolate(image, scale_factor=1.5, mode="bicubic")
    return F.grid_sample(bigger, w.view(1, 32, 64, 2).tanh(), align_corners=False).exp()


def losses(x: Tensor, w: Tensor) -> Tensor:
    scores = hidden(x, w).view(8, 8, SIDE).log_softmax(2)
    target = torch.randint(1, SIDE, (8, 4))
    lengths = torch.full((8,), 8), torch.full((8,), 4)
    return F.ctc_loss(scores, target, *lengths) + F.nll_loss(scores.view(SIDE, SIDE), torch.arange(SIDE))


def pairs(x: Tensor, w: Tensor) -> Tensor:
    """One value, saved by many."""
    h = hidden(x, w)
    parts = [part.exp() for part in h.unbind(0)[:5]] + [h.expand(3, SIDE, SIDE).sin().sum((0, 1))]
    return torch.stack(parts) @ (h * h * h)


def custom(x: Tensor, w: Tensor) -> Tensor:
    return Scaled.apply(Scaled.apply(hidden(x, w), 2.0).square(), 0.5)  # type: ignore[no-any-return]


def noise_packed_before_it_is_written(x: Tensor, w: Tensor) -> Tensor:
    return F.rrelu(F.rrelu(hidden(x, w), training=True) @ w, training=True)


def recurrent_cell(x: Tensor, w: Tensor) -> Tensor:
    h = c = torch.zeros(SIDE, SIDE // 4)
    for _ in range(4):
        h, c = torch.lstm_cell(hidden(x, w), (h, c), w, w[:, :16], w[0], w[1])
    return h * c


CASES: list[Function] = [
    slices,
    chunks,
    strided,
    channels_last,
    in_place,
    complex_numbers,
    integers,
    masks,
    half_precision,
    attention,
    convolutions,
    linear_algebra,
    reductions,
    scatters,
    samples,
    losses,
    pairs,
    custom,
    noise_packed_before_it_is_written,
    recurrent_cell,
]


@pytest.mark.parametrize("function", CASES, ids=lambda case: case.__name__)
def test_same_gradients(function: Function, spill_dir: Path) -> None:
    assert_same_gradients(function, spill_dir)


def test_shape_strides_offset_and_alignment_come_back(spill_dir: Path) -> None:
    seen: list[tuple[Any, ...]] = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h: Tensor) -> Tensor:
            ctx.save_for_backward(h)
            seen.append((h.shape, h.stride(), h.storage_offset(), h.dtype, h.data_ptr() % 64, bits(h)))
            return h.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            (h,) = ctx.saved_tensors
            seen.append((h.shape, h.stride(), h.storage_offset(), h.dtype, h.data_ptr() % 64, bits(h)))
            return grad

    x, w = leaves()
    with open_wide(spill_dir) as lms:
        outs = [
            Look.apply(hidden(x, w)[5:, 3:9]),
            Look.apply(hidden(x, w).t()),
            Look.apply(hidden(x, w).as_strided((4, 5), (1, 1), 11)),
            Look.apply(hidden(x, w)[:1].expand(9, SIDE)),
            Look.apply(hidden(x, w).to(torch.complex64)[::2]),
        ]
        assert evict(lms) >= len(outs)
        sum(out.abs().sum() for out in outs).backward()  # type: ignore[union-attr]
    assert sorted(map(str, seen[:5])) == sorted(map(str, seen[5:]))


def test_who_holds_the_storage_object_may_write_to_it(spill_dir: Path) -> None:
    """No tensor refers to the storage any more, but its Python object does: backward sees what it writes."""

    def slope(lms: torchlms.LMS | None) -> tuple[Tensor, int]:
        x, w = leaves()
        sigmoid = (x @ w).sigmoid()
        storage = sigmoid.untyped_storage()
        out = (sigmoid * 2).sum()
        del sigmoid
        before = evict(lms) if lms is not None else 0
        storage.fill_(0)  # type: ignore[arg-type]
        del storage
        after = evict(lms) if lms is not None else 1
        (found,) = torch.autograd.grad(out, (x,))
        return found, after - before

    plain, _ = slope(None)
    with open_wide(spill_dir) as lms:
        ours, more = slope(lms)
    assert torch.equal(ours, plain)
    assert bool((plain == 0).all())
    assert more == 1, "it may leave as soon as it is let go"


def test_a_backward_op_belongs_to_the_module_that_saved_for_it(spill_dir: Path) -> None:
    """And not to the one that made what it reads."""
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, padding=1),
        torch.nn.Flatten(),
        torch.nn.Linear(512, 4),
    )
    with torchlms.LMS(network, budget="1GiB", disk_dir=spill_dir) as lms:
        for _ in range(2):
            network(torch.randn(16, 3, 8, 8)).square().mean().backward()
    assert lms.tape is not None
    found = [(op.name.split(".")[1], op.module) for op in lms.tape.ops if op.phase is Phase.BACKWARD]
    ours = [(name, module) for name, module in found if "backward" in name or name == "mm"]
    assert ours == [
        ("mm", "5"),
        ("mm", "5"),
        ("convolution_backward", "3"),
        ("threshold_backward", "2"),
        ("native_batch_norm_backward", "1"),
        ("convolution_backward", "0"),
    ]
