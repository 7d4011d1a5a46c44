"""Rows: what is measured. Each row becomes one file in results/, and proves one thing."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from torchlms.bench.options import BenchOptions, Way

CAP = "16GiB"
# Losses are compared over all steps, warm-up included, and never over fewer than this.
IDENTITY_STEPS = 10


class Kind(str, Enum):
    """How a row is measured."""

    TRAINING = "training"  # plain, then LMS, then plain again in one process; each rival in its own
    ASIDE = "aside"  # plain and LMS in turns, for a difference of one per cent
    CONVOLUTIONS = "convolutions"  # each convolution before and after steps under LMS
    LADDER = "ladder"  # plain, planned, and without a plan that fits, in one process


@dataclass(frozen=True, slots=True)
class Target:
    """A figure of the row and what it must be: at least, at most, or true."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None

    def met(self, value: float | bool) -> bool:
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )

    def __str__(self) -> str:
        if self.at_least is None and self.at_most is None:
            return "yes"
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


# What holds in every row that trains under LMS.
ALWAYS = (
    Target("same_bits", at_least=1),
    Target("within_budget", at_least=1),
    Target("peak_error", at_most=0.05),
    Target("reserved_error", at_most=0.05),
    Target("step_error", at_most=0.10),
    Target("host_over_out", at_most=1.10),
)


@dataclass(frozen=True, slots=True)
class Rival:
    """Another way to fit, in a process of its own under the same cap, with as few steps as will do."""

    way: Way
    warmup: int = 2
    steps: int = 5


SAVE_ON_CPU = Rival(Way.SAVE_ON_CPU, warmup=1, steps=3)
CHECKPOINT = Rival(Way.CHECKPOINT)
CHECKPOINT_OFFLOAD = Rival(Way.CHECKPOINT_OFFLOAD, warmup=1, steps=3)
CAPPED = Rival(Way.NONE_CAPPED, warmup=1, steps=3)


@dataclass(frozen=True, slots=True)
class Row:
    """One row. ``seconds`` is about what its main part takes on the machine it is meant for.

    ``share``: the budget is this share of the plain run's peak, measured first. ``need_over_cap``:
    the batch is chosen so that plain needs this many times the cap. ``strict``: torch raises rather than
    run what does not repeat its bits; only then does the backward pass of attention repeat them.
    """

    name: str
    label: str
    proves: str
    options: BenchOptions
    kind: Kind = Kind.TRAINING
    warmup: int = 5
    steps: int = 10
    rivals: tuple[Rival, ...] = ()
    targets: tuple[Target, ...] = ()
    share: float = 0.0
    need_over_cap: float = 0.0
    batches: tuple[int, ...] = ()  # CONVOLUTIONS: steps are run at each of these
    cudnn_deterministic: bool = True
    strict: bool = False
    threads: int = 0  # of torch on the CPU; 0: as many as it takes by itself
    seconds: int = 30

    @property
    def cuda(self) -> bool:
        return self.options.device == "cuda"

    def definition(self) -> dict[str, Any]:
        """What a result of this row depends on, as plain data; another definition, another row."""
        told = asdict(replace(self.options, way=Way.LMS))
        defaults = asdict(BenchOptions())
        return {
            "kind": self.kind.value,
            "options": {name: value for name, value in told.items() if value != defaults[name]},
            "warmup": self.warmup,
            "steps": self.steps,
            **{
                name: getattr(self, name)
                for name in ("share", "need_over_cap", "cudnn_deterministic", "strict", "threads")
                if getattr(self, name)
            },
            **({"batches": list(self.batches)} if self.batches else {}),
        }


def _resnet(batch: int, rivals: tuple[Rival, ...], targets: tuple[Target, ...], proves: str) -> Row:
    """By moving alone."""
    return Row(
        name=f"resnet50-b{batch}",
        label=f"ResNet-50, batch {batch}, moving alone",
        proves=proves,
        options=BenchOptions(
            model="resnet50",
            batch_size=batch,
            image_size=224,
            device="cuda",
            budget=CAP,
            optimizer="sgd",
            recompute=False,
        ),
        rivals=rivals,
        targets=(*ALWAYS, *targets),
        seconds=25 if batch < 300 else 35,
    )


_SWAP = (Target("of_best", at_least=0.90), Target("over_save_on_cpu", at_least=2.5))
_SWAP_PROVES = "moving alone: near what the link allows, and far from save_on_cpu"

_JOINT_ALWAYS = (
    Target("same_bits", at_least=1),
    Target("within_budget", at_least=1),
    Target("peak_error", at_most=0.03),
    Target("step_error", at_most=0.07),
    Target("host_over_out", at_most=1.10),
    Target("over_rivals", at_least=1),
)
_JOINT_PROVES = "keep, host, disk and recompute in one plan"


def _joint(row: Row, of_plain: float, rivals: tuple[Rival, ...]) -> Row:
    """The same case as LMS takes it by default."""
    return replace(
        row,
        name=f"joint-{row.name}",
        label=row.label.removesuffix(", moving alone"),
        proves=_JOINT_PROVES,
        options=replace(row.options, recompute=True),
        rivals=rivals,
        targets=(*_JOINT_ALWAYS, Target("of_plain", at_least=of_plain)),
    )


def _ladder(name: str, *, recompute: bool) -> Row:
    """ResNet-50 without a plan that fits; planned, it moves alone, or as LMS takes it by default."""
    row = _resnet(230, (), (), "without a plan that fits: slower, never wrong, soon back at speed")
    return replace(
        row,
        name=name,
        label=row.label.removesuffix(", moving alone") if recompute else row.label,
        kind=Kind.LADDER,
        options=replace(row.options, recompute=recompute),
        steps=30,  # so many that plans have been raced, and the last ones say how fast it is from then on
        targets=(
            Target("finished", at_least=1),
            Target("same_bits", at_least=1),
            Target("within_budget", at_least=1),
            Target("misplanned_steps_to_speed", at_most=3),
            Target("shrunk_steps_to_settle", at_most=3),
            Target("shrunk_of_planned", at_least=0.90),
        ),
        seconds=110,
    )


def _large(
    name: str,
    label: str,
    options: BenchOptions,
    *,
    share: float = 0.0,
    of_plain: float | None = None,
    proves: str = _JOINT_PROVES,
    strict: bool = False,
) -> Row:
    """A network of its own under a joint plan; ``of_plain``: how much of plain's speed is aimed at, too."""
    aims = (Target("of_plain", at_least=of_plain),) if of_plain else ()
    return Row(
        name=name,
        label=label,
        proves=proves,
        options=replace(options, device="cuda", deterministic=strict),
        rivals=(CHECKPOINT, CHECKPOINT_OFFLOAD, SAVE_ON_CPU),
        targets=(*_JOINT_ALWAYS, *aims),
        share=share,
        strict=strict,
        seconds=60,
    )


def _shares(
    name: str,
    label: str,
    options: BenchOptions,
    shares: tuple[int, ...],
    proves: str,
    *,
    strict: bool = False,
) -> list[Row]:
    return [
        _large(
            f"joint-{name}-{share}",
            f"{label}, {share}% of its need",
            options,
            share=share / 100,
            proves=proves,
            strict=strict,
        )
        for share in shares
    ]


def _published(
    name: str,
    label: str,
    batch_size: int,
    shares: tuple[int, ...],
    *,
    proves: str = _JOINT_PROVES,
    strict: bool = True,
) -> list[Row]:
    """The network of that name in large.py."""
    model = f"large:{name.replace('-', '_')}"
    options = BenchOptions(model=model, batch_size=batch_size, optimizer="adamw")
    return _shares(name, label, options, shares, proves, strict=strict)


_LLAMA = BenchOptions(model="llama", batch_size=8, dtype="bfloat16", optimizer="adamw")
_UNTUNED_PROVES = "a family that nobody tuned for"
_PICKED_LAST_PROVES = "a network picked after the planner was done"
_CPU_TARGETS = tuple(
    Target(figure, at_least=1) for figure in ("same_bits", "within_budget", "fixed_below_half")
)

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        replace(
            _resnet(150, (), (), "what fits costs nothing: LMS steps aside"),
            label="ResNet-50, batch 150",
            kind=Kind.ASIDE,
            targets=(
                Target("same_bits", at_least=1),
                Target("nothing_installed", at_least=1),
                Target("of_plain", at_least=0.99),
                Target("peak_error", at_most=0.05),
                Target("step_error", at_most=0.10),
            ),
        ),
        _resnet(
            200,
            (CAPPED, SAVE_ON_CPU, CHECKPOINT),
            (Target("of_plain", at_least=0.97),),
            "the case on which IBM's LMS kept 0.08: it fails plainly, and runs at nearly full speed",
        ),
        _resnet(225, (SAVE_ON_CPU,), _SWAP, _SWAP_PROVES),
        _resnet(250, (SAVE_ON_CPU,), _SWAP, _SWAP_PROVES),
        _resnet(300, (SAVE_ON_CPU,), _SWAP, _SWAP_PROVES),
        _resnet(400, (SAVE_ON_CPU, CHECKPOINT, CHECKPOINT_OFFLOAD), _SWAP, _SWAP_PROVES),
        _joint(_resnet(200, (), (), ""), 0.98, (SAVE_ON_CPU, CHECKPOINT, CHECKPOINT_OFFLOAD)),
        _joint(_resnet(400, (), (), ""), 0.87, (SAVE_ON_CPU, CHECKPOINT, CHECKPOINT_OFFLOAD)),
        # save_on_cpu would pin 160 GB.
        _joint(_resnet(800, (), (), ""), 0.60, (CHECKPOINT, CHECKPOINT_OFFLOAD)),
        _ladder("ladder-resnet50-b230", recompute=False),
        _ladder("ladder-joint-resnet50-b230", recompute=True),
        Row(
            name="googlenet-8192",
            label="GoogLeNet, one image of 8192x8192, moving alone",
            proves="one sample that needs several times the cap trains",
            options=BenchOptions(
                model="googlenet", batch_size=1, image_size=8192, device="cuda", budget=CAP, optimizer="sgd",
                recompute=False,
            ),
            steps=5,
            rivals=(CAPPED, CHECKPOINT, CHECKPOINT_OFFLOAD, SAVE_ON_CPU),
            targets=ALWAYS,
            seconds=150,
        ),
        replace(
            _large(
                "joint-googlenet-8192",
                "GoogLeNet, one image of 8192x8192",
                BenchOptions(model="googlenet", batch_size=1, image_size=8192, budget=CAP, optimizer="sgd"),
                of_plain=0.50,
            ),
            steps=5,
            rivals=(CHECKPOINT, CHECKPOINT_OFFLOAD),
        ),
        *(
            _large(
                f"joint-llama-{gib}",
                f"Llama-shaped, 24 layers of 2048, 8 x 4096 tokens, bfloat16, in {gib} GiB",
                replace(_LLAMA, budget=f"{gib}GiB"),
                of_plain=of_plain,
                strict=True,
            )
            for gib, of_plain in ((24, 0.88), (40, 0.95))
        ),
        *_published("vit-large", "ViT-L/16, batch 352", 352, (50, 25)),
        *_published("bert-large", "BERT-large, 128 x 512 tokens", 128, (50, 25)),
        *_shares(
            "unet3d",
            "3D U-Net, 4 x 192x192x192",
            BenchOptions(model="unet3d", batch_size=1, image_size=192, optimizer="adamw"),
            (40, 25),
            _JOINT_PROVES,
        ),
        *_published(
            "convnext-large", "ConvNeXt-L, batch 320", 320, (40,), proves=_UNTUNED_PROVES, strict=False
        ),
        *_published("t5-large", "T5-large, 16 x 512 tokens", 16, (40,), proves=_UNTUNED_PROVES),
        *_published("gpt2-medium", "GPT-2 medium, 24 x 1024 tokens", 24, (40,), proves=_PICKED_LAST_PROVES),
        *_published("swin-base", "Swin-B, batch 256", 256, (40,), proves=_PICKED_LAST_PROVES),
        Row(
            name="cifar10-full",
            label="cifar10_full, batch for 1.09 of the cap",
            proves="IBM's other case: a little too large costs next to nothing",
            options=BenchOptions(
                model="cifar10_full", image_size=32, device="cuda", budget=CAP, optimizer="sgd"
            ),
            rivals=(CAPPED,),
            targets=(*ALWAYS, Target("of_plain", at_least=0.98)),
            need_over_cap=1.09,
            seconds=35,
        ),
        Row(
            name="conv-health",
            label="Convolutions of ResNet-50 after 20 planned steps",
            proves="no convolution was starved: uncapped speed and uncapped bits after steps under the cap",
            options=BenchOptions(
                model="resnet50", image_size=224, device="cuda", budget=CAP, optimizer="sgd", recompute=False
            ),
            kind=Kind.CONVOLUTIONS,
            steps=20,
            batches=(200, 400),
            targets=(
                Target("max_slowdown", at_most=1.15),
                Target("same_bits", at_least=1),
                Target("starved_convolutions", at_most=0),
            ),
            cudnn_deterministic=False,  # as torch ships it, which is when cuDNN may take the most room
            seconds=75,
        ),
        Row(
            name="cpu-resnet50-b32-128",
            label="ResNet-50, batch 32 at 128x128",
            proves="the CPU as the device, a spill file as the slow tier, 60% of the plain peak",
            options=BenchOptions(
                model="resnet50", batch_size=32, image_size=128, device="cpu", optimizer="sgd"
            ),
            steps=5,
            threads=1,
            share=0.6,
            targets=_CPU_TARGETS,
            seconds=220,
        ),
        Row(
            name="cpu-transformer",
            label="Llama-shaped, 8 layers of 256, 8 x 256 tokens",
            proves="the same for a transformer with AdamW",
            options=BenchOptions(
                model="llama", batch_size=8, device="cpu", hidden=256, layers=8, heads=4, sequence=256,
                vocab=2000, optimizer="adamw",
            ),
            steps=5,
            threads=1,  # with two, plain does not repeat its own bits
            share=0.6,
            targets=_CPU_TARGETS,
            seconds=90,
        ),
    )
}  # fmt: skip


def tiny(row: Row) -> Row:
    """The same machinery on any machine in seconds, for tests; its figures mean nothing."""
    trains = row.kind in (Kind.TRAINING, Kind.LADDER)
    if trains:
        options = BenchOptions(
            model="llama", batch_size=8, device="cpu", hidden=32, layers=6, heads=2, sequence=64, vocab=50
        )
    else:
        options = BenchOptions(model="cifar10_full", batch_size=8, device="cpu", budget="1GiB")
    return replace(
        row,
        options=replace(options, recompute=row.options.recompute),
        share=0.6 if trains else 0.0,
        need_over_cap=0.0,
        warmup=5,
        steps=5,
        batches=tuple(batch // 50 for batch in row.batches),
        rivals=tuple(Rival(rival.way, warmup=1, steps=2) for rival in row.rivals),
    )


def find(patterns: list[str]) -> list[Row]:
    """The rows whose names begin so; all of them for ``all``."""
    found: dict[str, Row] = {}
    for pattern in patterns:
        exact = [ROWS[pattern]] if pattern in ROWS else []
        named = exact or [row for row in ROWS.values() if pattern == "all" or row.name.startswith(pattern)]
        if not named:
            raise SystemExit(f"no row begins with {pattern!r}; there are {', '.join(ROWS)}")
        found.update({row.name: row for row in named})
    return list(found.values())
