"""BenchOptions: one benchmark run, as asked for on the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch

from torchlms.bench.networks import Network, NetworkOptions
from torchlms.errors import BadOption, LMSError
from torchlms.memory.device import read_device, supported
from torchlms.memory.limits import parse_option
from torchlms.rule_text import read_rules

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_PLAIN_WARMUP_STEPS = 3
# One step is recorded, two are timed, two settle; on a device the allocator's habits are then learned.
_LMS_WARMUP_STEPS = {"cpu": 5, "cuda": 20}


class Way(str, Enum):
    """How the steps are made to fit."""

    LMS = "lms"
    NONE = "none"
    NONE_CAPPED = "none_capped"
    SAVE_ON_CPU = "save_on_cpu"
    CHECKPOINT = "checkpoint"
    CHECKPOINT_OFFLOAD = "checkpoint_offload"


RIVALS = tuple(way for way in Way if way is not Way.LMS)


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """Everything one run depends on. Zero for a size means the network's own default."""

    model: str = "resnet50"
    batch_size: int = 0
    image_size: int = 0
    num_batches: int = 100
    warmup: int = -1  # steps; -1: the way's own default
    display_every: int = 10
    device: str = ""
    dtype: str = "float32"
    optimizer: str = ""
    learning_rate: float = 0.0  # 0: the optimizer's own default
    way: Way = Way.LMS
    budget: str | None = None
    host_budget: str | None = None
    disk_dir: str | None = None
    disk_budget: str | None = None
    plan: str | None = None
    recompute: bool = True
    rule: tuple[str, ...] = ()  # each as rule_text reads it
    verify: bool = False
    verify_every: int = 0  # steps; 0: as verify says
    snapshot: bool = False
    cap: str | None = None
    seed: int = 1
    cudnn_benchmark: bool = False
    deterministic: bool = False
    hidden: int = 2048
    layers: int = 24
    heads: int = 0
    kv_heads: int = 0
    sequence: int = 4096
    vocab: int = 32000
    width: int = 16
    norm: str = "instance"

    def resolve(self, network: Network) -> BenchOptions:
        """With every default filled in, and checked."""
        device = self.device or read_device(None).type
        try:
            supported(read_device(device))
        except LMSError as error:
            raise BadOption(f"--{error}") from None
        if self.dtype not in DTYPES:
            raise BadOption(f"--dtype {self.dtype}: choose {' or '.join(DTYPES)}")
        if self.num_batches < 1 or self.display_every < 1:
            raise BadOption("--num-batches and --display-every must be at least 1")
        if self.way is Way.LMS and self.cap is not None:
            raise BadOption("--cap is for runs without LMS; with LMS the budget is the cap")
        if self.way is not Way.LMS and self.plan is not None:
            raise BadOption("--plan needs LMS; drop --no-lms or --way")
        ours = {
            "no_recompute": not self.recompute,
            **{name: getattr(self, name) for name in ("rule", "verify", "verify_every", "snapshot")},
        }
        if self.way is not Way.LMS and any(ours.values()):
            names = ", ".join(f"--{name.replace('_', '-')}" for name, given in ours.items() if given)
            raise BadOption(f"{names}: only LMS can do that; drop --no-lms or --way")
        if self.verify_every < 0:
            raise BadOption(f"--verify-every {self.verify_every}: a number of steps")
        self.rules()
        if self.batch_size < 0 or self.image_size < 0:
            raise BadOption("--batch-size and --image-size must not be negative")
        if 0 < self.image_size < network.least_image_size:
            least = network.least_image_size
            raise BadOption(f"--image-size {self.image_size}: {network.name} needs at least {least}")
        self._check_sizes()
        warmup = self.warmup
        if warmup < 0:
            warmup = (
                _LMS_WARMUP_STEPS["cpu" if device == "cpu" else "cuda"]
                if self.way is Way.LMS
                else _PLAIN_WARMUP_STEPS
            )
        return replace(
            self,
            batch_size=self.batch_size or network.default_batch_size,
            image_size=self.image_size or network.default_image_size,
            warmup=warmup,
            device=device,
            optimizer=self.optimizer or network.default_optimizer,
        )

    def _check_sizes(self) -> None:
        """Refuse an unreadable size now: LMS would only see it after all rivals have run."""
        for name in ("budget", "host_budget", "disk_budget", "cap"):
            text = getattr(self, name)
            if text is not None and (name, text) != ("cap", "none"):
                option = f"--{name.replace('_', '-')}"
                parse_option(option, text, whole_bytes=1 << 60, or_none=name[:4] in ("host", "disk"))

    def rules(self) -> dict[str, Any] | None:
        """The keyword ``rules`` of ``LMS``."""
        return read_rules(self.rule, recompute=self.recompute)

    def torch_device(self) -> torch.device:
        """The device with its index, which the allocator's cap insists on."""
        return read_device(self.device)

    def network_options(self) -> NetworkOptions:
        """The part that the network reads."""
        return NetworkOptions(
            batch_size=self.batch_size,
            image_size=self.image_size,
            dtype=DTYPES[self.dtype],
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            sequence=self.sequence,
            vocab=self.vocab,
            width=self.width,
            norm=self.norm,
        )


def parse_ways(text: str) -> tuple[Way, ...]:
    """``"none,checkpoint"`` as ways, each once, in the order given."""
    ways: list[Way] = []
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in [way.value for way in RIVALS]:
            raise BadOption(f"--compare {name}: choose from {', '.join(way.value for way in RIVALS)}")
        if Way(name) not in ways:
            ways.append(Way(name))
    return tuple(ways)
