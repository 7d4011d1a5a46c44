"""Loops by the program around them: sizes, branches, evaluation, threads, workers, compilers, files."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sessions import Session, plain_step
from small_networks import NETWORKS, Network
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tests.matrix.passes import loss_of
from tests.matrix.row import STEPS, Row
from tests.matrix.stack import PERCEPTRON, WIDTH, Stack, learning, stack, stack_of


def changing_sizes(session: Session, step: int) -> None:
    """Another batch size almost every step, and a small last batch."""
    whole = session.network.batch_size
    size = [whole, whole // 2, whole - 3, whole, 3][step % 5]
    inputs, target = session.network.batch(step, size)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def changing_lengths(session: Session, step: int) -> None:
    """Sequences of another length every step."""
    tokens, target = session.network.batch(step)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(tokens[:, : 16 - 3 * step % 10]), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def evaluate_between(session: Session, step: int) -> None:
    """Evaluation without gradients after every step, with them by mistake after every second."""
    plain_step(session, step)
    inputs, target = session.network.batch(50 + step)
    session.model.eval()
    with torch.no_grad() if step % 2 else torch.inference_mode():
        session.note(F.cross_entropy(session.model(inputs), target))
    if step % 2:
        session.note(F.cross_entropy(session.model(inputs), target))
    session.model.train()


def evaluate_inside(session: Session, step: int) -> None:
    """Evaluation between a forward pass and its backward pass."""
    session.optimizer.zero_grad()
    loss = loss_of(session, step)
    with torch.inference_mode() if step % 2 else torch.no_grad():
        session.note(loss_of(session, 50 + step))
    loss.backward()
    session.optimizer.step()
    session.note(loss)


class Branching(nn.Module):
    """What is run depends on the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(16, WIDTH), nn.Linear(WIDTH, 10)
        self.left = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.right = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for left, right in zip(self.left, self.right, strict=True):
            x = torch.tanh(left(x)) if float(x.detach().sum()) > 0 else torch.sigmoid(right(x)).exp()
        while float(x.detach().norm()) > 20:
            x = torch.sin(x) * 0.7
        return self.leave(x)


def routed(x: Tensor) -> Tensor:
    """Each row goes to one of three experts, by its own numbers."""
    chosen = x.detach()[:, :3].argmax(1)
    out = torch.zeros_like(x)
    for index, expert in enumerate((torch.tanh, torch.sigmoid, torch.exp)):
        rows = (chosen == index).nonzero().squeeze(1)
        out = out.index_add(0, rows, expert(x[rows].tanh()))
    return out


def found(x: Tensor) -> Tensor:
    """The result of the op is as large as the numbers will have it."""
    rows, columns = (x.detach() > 0).nonzero().unbind(1)
    return torch.tanh(x).index_put((rows, columns), x[rows, columns].exp())


def from_lists(x: Tensor) -> Tensor:
    """Tensors made of Python lists, which the CPU's ledger meets when they are there."""
    return torch.sigmoid(x + torch.tensor([[0.01 * column for column in range(WIDTH)]] * len(x)))


class Batches(Dataset[Any]):
    """Made in the worker, by ops that a mode would see."""

    def __len__(self) -> int:
        return STEPS * 256

    def __getitem__(self, index: int) -> Any:
        generator = torch.Generator().manual_seed(index)
        return torch.randn(16, generator=generator).sin() + 1, int(index % 10)


def with_workers(session: Session, step: int) -> None:
    """Batches made by other processes, which are forked in the middle of a step that is recorded."""

    def batches() -> Iterator[Any]:
        order = torch.Generator().manual_seed(3)
        return iter(DataLoader(Batches(), 256, shuffle=True, num_workers=2, generator=order))

    device = torch.get_default_device()
    with torch.device("cpu"):  # a forked process cannot use a device
        inputs, target = (part.to(device) for part in next(session.keep("batches", batches)))
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def in_a_thread(training: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(training).result()


def adversaries(session: Session, step: int) -> None:
    """Generator and discriminator with an optimizer each; the graph of what was made is used twice."""
    maker, judge = session.model.maker, session.model.judge
    judging = session.keep("judging", lambda: torch.optim.Adam(judge.parameters(), 1e-2))  # type: ignore[union-attr]
    real, made = torch.randn(300, 32), maker(torch.randn(256, 32))  # type: ignore[operator]
    judging.zero_grad()
    loss = F.softplus(-judge(real)).mean() + F.softplus(judge(made.detach())).mean()  # type: ignore[operator]
    loss.backward()
    judging.step()
    session.optimizer.zero_grad()
    F.softplus(-judge(made)).mean().backward()  # type: ignore[operator]
    session.optimizer.step()
    session.note(loss)


def make_adversaries() -> nn.Module:
    maker = nn.Sequential(*[layer for _ in range(8) for layer in (nn.Linear(32, 32), nn.Sigmoid())])
    judge = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    return nn.ModuleDict({"maker": maker, "judge": judge})


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.maker.parameters(), 1e-2)  # type: ignore[union-attr]


def taught(session: Session, step: int) -> None:
    """A student that learns from a teacher in evaluation mode, which follows slowly."""
    teacher = session.keep("teacher", session.network.make_model).eval()
    inputs, _ = session.network.batch(step)
    with torch.no_grad():
        aim = teacher(inputs).softmax(1)
    session.optimizer.zero_grad()
    loss = F.cross_entropy(session.model(inputs), aim)
    loss.backward()
    session.optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(teacher.parameters(), session.model.parameters(), strict=True):
            slow.lerp_(fast, 0.1)
    session.note(loss)


def saved_and_loaded(session: Session, step: int) -> None:
    """Model and optimizer written to a file after every step, spoilt, and read again."""
    plain_step(session, step)
    file = io.BytesIO()
    torch.save([session.model.state_dict(), session.optimizer.state_dict()], file)
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.zero_()
    file.seek(0)
    model_state, optimizer_state = torch.load(file)
    session.model.load_state_dict(model_state)
    session.optimizer.load_state_dict(optimizer_state)


def fresh_compiler(training: Callable[[], Any]) -> Any:
    torch._dynamo.reset()
    return training()


class Compiled(Stack):
    """A stack of which every second block is compiled."""

    def __init__(self, backend: str = "aot_eager") -> None:
        super().__init__(nn.Sigmoid, 6)
        self.compiled = [torch.compile(block, backend=backend) for block in self.blocks[:3]]

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for compiled, block in zip(self.compiled, self.blocks[3:], strict=True):
            x = block(compiled(x))
        return self.leave(x)


def no_compiler() -> str:
    """inductor writes C++ for the CPU."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    return "" if found else "no C++ compiler is at hand"


def functional(session: Session, step: int) -> None:
    """The model called with weights that are handed in."""
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    weights = {name: item * 0.5 for name, item in session.model.named_parameters()}
    loss = F.cross_entropy(torch.func.functional_call(session.model, weights, (inputs,)), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)


def mapped(session: Session, step: int) -> None:
    """An ensemble over stacked weights by ``vmap``, and a directional derivative by ``jvp``."""
    inputs, target = session.network.batch(step)
    session.optimizer.zero_grad()
    weights = {name: torch.stack([item, item * 0.5]) for name, item in session.model.named_parameters()}

    def call(own: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(session.model, own, (inputs,))

    loss = F.cross_entropy(torch.func.vmap(call)(weights).mean(0), target)
    loss.backward()
    session.optimizer.step()
    session.note(loss)
    with torch.no_grad():
        _, slope = torch.func.jvp(session.model, (inputs,), (torch.ones_like(inputs),))
    session.note(slope.norm())


def per_sample(session: Session, step: int) -> None:
    """A gradient for each sample: ``vmap`` over ``grad``."""
    inputs, target = session.network.batch(step)
    weights = {name: item.detach() for name, item in session.model.named_parameters()}

    def loss_of_one(own: dict[str, Tensor], one: Tensor, aim: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(session.model, own, (one,)), aim)

    gradients = torch.func.vmap(torch.func.grad(loss_of_one), (None, 0, 0))(weights, inputs, target)
    for name, item in session.model.named_parameters():
        item.grad = gradients[name].mean(0)
    session.optimizer.step()


ADVERSARIES = Network("gan", make_adversaries, make_optimizer, NETWORKS["mlp"].make_inputs, 256)
TRANSFORMER = NETWORKS["transformer"]
SMOOTH = stack("smooth", nn.Sigmoid)

ROWS = [
    Row("batch size changes", "almost every step, and a small last batch", changing_sizes),
    Row("sequence length changes", "in every step", changing_lengths, TRANSFORMER),
    Row("evaluation between steps", "`no_grad`, `inference_mode`, or neither", evaluate_between),
    Row("evaluation inside a step", "between forward and backward", evaluate_inside),
    Row(
        "branches and loops", "taken by the numbers in the tensors", network=learning("branching", Branching)
    ),
    Row(
        "routing",
        "rows sent to experts by their own numbers",
        network=stack_of(routed),
    ),
    Row("nonzero", "places found by the numbers", network=stack_of(found)),
    Row(
        "tensors from lists",
        "`torch.tensor([...])` inside the network",
        network=stack_of(from_lists),
        share=0.85,
    ),
    Row("DataLoader workers", "two processes that are forked while LMS is on", with_workers),
    Row("a thread", "LMS and the loop in a thread that is not the main one", around=in_a_thread),
    Row(
        "two models",
        "a GAN: two networks, two optimizers",
        adversaries,
        ADVERSARIES,
        0.85,
    ),
    Row("teacher and student", "a second model without gradients that follows the first", taught),
    Row("saved and loaded", "`state_dict` to a file and back after every step", saved_and_loaded),
    Row(
        "resumed",
        "from `state_dict` in a new LMS, as a new process would",
        network=PERCEPTRON,
        resumes_at=4,
    ),
    Row(
        "torch.compile",
        "of every second block",
        network=learning("compiled", Compiled),
        share=0.8,
        around=fresh_compiler,
    ),
    Row(
        "torch.compile with inductor",
        "of every second block, by torch's own compiler",
        network=learning("inductor", partial(Compiled, "inductor")),
        share=0.8,
        around=fresh_compiler,
        slow=True,
        unable=no_compiler,
    ),
    Row(
        "torch.func.functional_call",
        "weights computed and handed in",
        functional,
        SMOOTH,
    ),
    Row("torch.func.vmap and jvp", "an ensemble, a directional derivative", mapped, SMOOTH),
    Row("torch.func.grad", "gradients per sample", per_sample, SMOOTH, refused="saved tensor hooks"),
]
