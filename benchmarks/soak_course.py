"""Course: what a soak trains, always the same steps: a small transformer on the CPU, ResNet-50 on CUDA."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlms.bench.networks import get_network
from torchlms.bench.networks.network import NetworkOptions
from torchlms.eager import private

GIVEN_UP = 100  # one step in so many goes forward and not backward
EVALUATED = 50
_SEED = 7
_WORDS, _WIDTH = 64, 64
_BATCHES, _SEQUENCES = (2, 3, 4, 8), (16, 32, 48)
# Plain needs 6.5, 12.9, 17.5 and 20.6 GiB: half of the steps do not fit into 16 GiB.
_IMAGES = (64, 128, 176, 208)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Course:
    """A network, and a batch for every step. Each round has every shape once, in an order drawn anew."""

    make_model: Callable[[], nn.Module]
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    make_batch: Callable[[Shape, int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    shapes: Sequence[Shape]
    budget_bytes: int
    rules: dict[str, Any]

    def shape(self, number: int) -> Shape:
        lap, place = divmod(number, len(self.shapes))
        return random.Random(lap).sample(list(self.shapes), len(self.shapes))[place]


@dataclass
class Trace:
    """What a run leaves to compare: the loss of each step, and by step a digest of all state after it."""

    losses: list[str] = field(default_factory=list)
    digests: dict[int, str] = field(default_factory=dict)

    def same_as(self, other: Trace) -> bool:
        """As far as both have come; a loss is of all that was before it."""
        losses = all(map(str.__eq__, self.losses, other.losses))
        common = self.digests.keys() & other.digests.keys()
        return losses and all(self.digests[number] == other.digests[number] for number in common)


@dataclass
class Training:
    """One run over a course."""

    course: Course
    model: nn.Module
    optimizer: torch.optim.Optimizer
    trace: Trace = field(default_factory=Trace)

    @staticmethod
    def begin(course: Course) -> Training:
        torch.manual_seed(_SEED)
        model = course.make_model()
        training = Training(course, model, course.make_optimizer(model))
        torch.manual_seed(_SEED)
        return training

    def step(self, number: int) -> None:
        inputs, target = self.course.make_batch(self.course.shape(number), number)
        self.optimizer.zero_grad()
        loss = self.course.loss(self.model(inputs), target)
        if number % GIVEN_UP == GIVEN_UP - 1:
            return  # as if the batch were bad
        loss.backward()
        self.optimizer.step()
        self.trace.losses.append(float(loss.detach()).hex())
        if number % EVALUATED == 0:
            self.model.eval()
            with torch.no_grad():
                self.model(inputs)
            self.model.train()

    def digest(self, done: int) -> None:
        """Note parameters, buffers and optimizer states as they are after so many steps."""
        states = self.optimizer.state_dict()["state"].values()
        items = [*self.model.state_dict().values(), *(item for state in states for item in state.values())]
        with private.unwatched():
            self.trace.digests[done] = _digest(items)


def _digest(items: list[Any]) -> str:
    whole = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            whole.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            whole.update(repr(item).encode())
    return whole.hexdigest()


# -- on the CPU ------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Embedding, two encoder layers with dropout, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_WORDS, _WIDTH)
        layer = nn.TransformerEncoderLayer(_WIDTH, 4, 4 * _WIDTH, dropout=0.1, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, _WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(ids)))


def _words(shape: Shape, number: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, _WORDS, shape, generator=torch.Generator().manual_seed(number))
    return ids, ids.roll(1, 1)


def _cpu() -> Course:
    return Course(
        make_model=Transformer,
        make_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
        make_batch=_words,
        loss=lambda scores, target: F.cross_entropy(scores.flatten(0, 1), target.flatten()),
        shapes=[(batch, sequence) for batch in _BATCHES for sequence in _SEQUENCES],
        budget_bytes=6 << 20,
        rules={"min_bytes": 4096},
    )


# -- on CUDA ---------------------------------------------------------------------------------------


def _cuda() -> Course:
    network, device = get_network("resnet50"), torch.device("cuda", torch.cuda.current_device())

    def sizes(batch: int) -> NetworkOptions:
        return NetworkOptions(batch_size=batch, image_size=224)

    def make_batch(shape: Shape, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(number)
        inputs, target = network.make_batch(sizes(*shape), device, generator)
        return inputs, target

    return Course(
        make_model=lambda: network.build(sizes(_IMAGES[0]), device)[0],
        make_optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        make_batch=make_batch,
        loss=network.loss,
        shapes=[(batch,) for batch in _IMAGES],
        budget_bytes=16 << 30,
        rules={},
    )


COURSES: dict[str, Callable[[], Course]] = {"cpu": _cpu, "cuda": _cuda}
