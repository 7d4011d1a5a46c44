"""Options: those that several verbs of the command line share, each with its one line of help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchlms.cli import completion

# typer reads annotations while it runs, so these must exist then.
Text = str | None
File = Path | None
Files = list[Path] | None
Numbers = list[int] | None
Words = list[str]

ImageSize = Annotated[int, typer.Option(help="Edge in pixels or voxels. 0: the network's own.")]
Model = Annotated[
    str,
    typer.Option(
        help="A name from bench --list, or package.module:factory.", autocompletion=completion.models
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="cuda or cpu. Default: cuda where there is one.",
        autocompletion=completion.one_of("cuda", "cpu"),
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Model type: float32 or bfloat16.", autocompletion=completion.one_of("float32", "bfloat16")
    ),
]
Optimizer = Annotated[
    str,
    typer.Option(
        help="sgd, adam or adamw. Default: adamw for llama.",
        autocompletion=completion.one_of("sgd", "adam", "adamw"),
    ),
]
Budget = Annotated[Text, typer.Option(help="Device memory: bytes, 16GiB or 80%. Default: all.")]
HostBudget = Annotated[Text, typer.Option(help="Host memory for what leaves: bytes or 64GiB; 0 for none.")]
Recompute = Annotated[bool, typer.Option(help="Whether LMS may also drop values and make them again.")]
Rule = Annotated[
    Words | None,
    typer.Option(
        help="What may leave, name=value as in docs/tuning.md; once for each rule.",
        autocompletion=completion.rules,
    ),
]
DiskDir = Annotated[Text, typer.Option(help="Folder whose disk is meant. Default: a cache.")]
DiskBudget = Annotated[Text, typer.Option(help="Disk for what leaves: bytes or 500GB; 0 for none.")]
SpillDir = Annotated[Text, typer.Option(help="Folder for a spill file. Default: a cache.")]
SpillBudget = Annotated[Text, typer.Option(help="Size of the spill file: bytes or 500GB; 0 for none.")]
PlanFile = Annotated[Text, typer.Option(help="A plan file to use instead of planning.")]
NoPlan = Annotated[
    bool, typer.Option("--no-plan", help="Plan nothing: values leave only when memory runs out.")
]
MachineFile = Annotated[File, typer.Option(help="Rates of another machine: torchlms probe --json.")]
Report = Annotated[bool, typer.Option("--report", help="Print LMS's own report at the end.")]
Json = Annotated[File, typer.Option("--json", help="Write the figures to this file; - prints nothing else.")]
Verify = Annotated[bool, typer.Option("--verify", help="Check in some steps the bits of what comes back.")]
VerifyEvery = Annotated[int, typer.Option(help="The same, in every so many steps; --verify: in every 100th.")]
Snapshot = Annotated[
    bool, typer.Option("--snapshot", help="Undo an optimizer step that fails for want of memory.")
]
Csv = Annotated[File, typer.Option("--csv", help="Write one row per step to this file.")]
_LEVELS = completion.one_of("debug", "info", "warning", "error", "off")
Log = Annotated[
    str,
    typer.Option(
        help="What LMS says: debug, info, warning, error or off. Default: info.", autocompletion=_LEVELS
    ),
]
FitLog = Annotated[
    str,
    typer.Option(
        help="What LMS says while recording: debug, info, warning, error, off. Default: warning.",
        autocompletion=_LEVELS,
    ),
]
SaveRun = Annotated[File, typer.Option(help="Write the record of the run, for torchlms report.")]
CudnnBenchmark = Annotated[bool, typer.Option("--cudnn-benchmark", help="Let cuDNN try out its algorithms.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="Only algorithms whose bits repeat.")]

# The shape of a network, where it is open.
Hidden = Annotated[int, typer.Option(help="llama: width of the stream.")]
Layers = Annotated[int, typer.Option(help="llama: decoder layers.")]
Heads = Annotated[int, typer.Option(help="llama: attention heads. 0: one per 128 of hidden.")]
KvHeads = Annotated[int, typer.Option(help="llama: key and value heads. 0: as many as heads.")]
Sequence = Annotated[int, typer.Option(help="llama: tokens per sample.")]
Vocab = Annotated[int, typer.Option(help="llama: size of the vocabulary.")]
Width = Annotated[int, typer.Option(help="unet3d: channels at full resolution.")]
Norm = Annotated[
    str,
    typer.Option(help="unet3d: instance or batch.", autocompletion=completion.one_of("instance", "batch")),
]
