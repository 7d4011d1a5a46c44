"""Question: what is asked of ``torchlms fit``, and the tape, machine and budget that follow from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from torchlms import api
from torchlms.bench.networks import get_network
from torchlms.bench.options import BenchOptions
from torchlms.core.held import with_held
from torchlms.core.machine import Machine
from torchlms.core.plan import Budget
from torchlms.core.rules import Rules
from torchlms.errors import BadOption
from torchlms.fit import recording
from torchlms.fit.scale import Scale
from torchlms.memory.device import read_device, supported
from torchlms.memory.limits import disk_free_bytes, host_available_bytes, parse_option
from torchlms.memory.spill_place import directory_for
from torchlms.outlet import check_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torchlms.core.tape import Tape
    from torchlms.fit.recording import Recording

    Write = Callable[[str], None]

_SHARE = 0.9  # of free host memory and disk, as LMS takes by default
_WHOLE = 1 << 60


@dataclass(frozen=True, slots=True)
class Question:
    """One call of the command. ``options`` says what to train and the budgets; the rest where from."""

    options: BenchOptions
    record: str = ""  # batch sizes, separated by commas
    tapes: tuple[Path, ...] = ()
    batches: tuple[int, ...] = ()
    machine: Path | None = None
    save_tape: Path | None = None
    curve: bool = False
    largest: bool = False

    def check(self) -> None:
        """Refuse now what would only be found out after minutes of recording."""
        options = self.options
        for name in ("budget", "host_budget", "disk_budget"):
            text = getattr(options, name)
            if text is not None:
                _read_size(name, text, _WHOLE)
        options.rules()
        if options.device and not self.tapes:
            supported(read_device(options.device))
        if options.batch_size < 0:
            raise BadOption("--batch-size must not be negative")
        check_folder(self.save_tape)
        if self.tapes and (self.record or self.save_tape):
            raise BadOption("--tape reads recordings; drop --record and --save-tape, or --tape")
        if self.batches and not self.tapes:
            raise BadOption("--batch says at which batch size a --tape was recorded; there is no --tape")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What an answer rests on. ``scale`` is None with one recording; ``batch_size`` 0 is not known."""

    recordings: tuple[Recording, ...]
    scale: Scale | None
    batch_size: int
    tape: Tape
    machine: Machine
    budget: Budget
    rules: Rules

    @property
    def extrapolated(self) -> bool:
        """Whether the batch asked for is one that nobody recorded."""
        return self.batch_size not in {item.batch_size for item in self.recordings}


def gather(question: Question, write: Write) -> Evidence:
    """Record or read what is needed. BadOption and PlanMismatch say what cannot be answered, and why."""
    question.check()
    if question.tapes:
        recordings = recording.load(question.tapes, question.batches)
        batch_size = question.options.batch_size or recordings[-1].batch_size
    else:
        recordings, batch_size = _recorded(question, write)
    rules = Rules.read(question.options.rules() or {})
    if rules.held:
        recordings = tuple(replace(item, tape=with_held(item.tape)) for item in recordings)
    scale = None
    if len(recordings) == 2:
        first, second = recordings
        scale = Scale.of(first.tape, second.tape, first.batch_size, second.batch_size)
    tape = _tape_of(recordings, scale, batch_size)
    machine = _machine(question, tape, write)
    return Evidence(recordings, scale, batch_size, tape, machine, _budget(question, machine), rules)


def _recorded(question: Question, write: Write) -> tuple[tuple[Recording, ...], int]:
    network = get_network(question.options.model)
    options = question.options.resolve(network)
    if question.record:
        batch_sizes: Sequence[int] = _read_batches(question.record)
    else:
        batch_sizes = recording.batches_to_record(options.batch_size)
    recordings = []
    for batch_size in batch_sizes:
        recordings.append(recording.record(options, batch_size, write))
        if question.save_tape is not None:
            for path in recording.save(recordings[-1:], question.save_tape):
                write(f"wrote {path}")
    return tuple(recordings), options.batch_size


def _read_batches(text: str) -> tuple[int, ...]:
    try:
        batch_sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadOption(f"--record {text}: write one or two batch sizes, for example 50,100") from None
    if not 1 <= len(batch_sizes) <= 2 or min(batch_sizes) < 1:
        raise BadOption(f"--record {text}: write one or two batch sizes, for example 50,100")
    if len(set(batch_sizes)) != len(batch_sizes):
        raise BadOption(f"--record {text}: both batch sizes are the same, and a line needs two")
    return batch_sizes


def _tape_of(recordings: Sequence[Recording], scale: Scale | None, batch_size: int) -> Tape:
    for item in recordings:
        if item.batch_size == batch_size:
            return item.tape
    if scale is None:
        known = recordings[0].batch_size
        if known == 0:
            raise BadOption("--batch-size needs to know what the tape is of: say so with --batch")
        raise BadOption(
            f"one recording, of batch {known}, says nothing of batch {batch_size}: two are needed, of "
            "different batch sizes (--record 50,100, or --tape and --batch twice)"
        )
    return scale.at(batch_size)


def _machine(question: Question, tape: Tape, write: Write) -> Machine:
    """The one that was named, or this one if it is what the tape was recorded on."""
    if question.machine is not None:
        return Machine.load(question.machine)
    if question.tapes:
        here = "cpu" if tape.device == "cpu" else _cuda_name()
        if here != tape.device:
            raise BadOption(
                f"the tape was recorded on {tape.device}, which is not here: name a file of its rates with "
                "--machine (torchlms probe --json FILE writes it there)"
            )
    on_cpu = tape.device == "cpu"
    device = read_device("cpu" if on_cpu else question.options.device or "cuda")
    return api.measured_machine(device, question.options.disk_dir, progress=write)


def _cuda_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _budget(question: Question, machine: Machine) -> Budget:
    """Shares are of what the machine has: this one's free memory now, another one's as it was probed."""
    options = question.options
    if question.machine is not None:
        host_bytes, disk_bytes = machine.host_available_bytes, machine.disk_free_bytes
    else:
        folder = directory_for(options.disk_dir)
        host_bytes, disk_bytes = host_available_bytes(), disk_free_bytes(folder)
    return Budget(
        device_bytes=_size("budget", options.budget, machine.device_bytes, 1.0),
        host_bytes=_size("host_budget", options.host_budget, host_bytes, _SHARE),
        disk_bytes=_size("disk_budget", options.disk_budget, disk_bytes, _SHARE),
    )


def _size(name: str, text: str | None, whole_bytes: int, share: float) -> int:
    return int(share * whole_bytes) if text is None else _read_size(name, text, whole_bytes)


def _read_size(name: str, text: str, whole_bytes: int) -> int:
    option = f"--{name.replace('_', '-')}"
    return parse_option(option, text, whole_bytes=whole_bytes, or_none=name != "budget")
