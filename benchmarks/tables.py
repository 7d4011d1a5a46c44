"""Tables: the READMEs' figures, written from the result files and never by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ladder
from borrowed import result as suites
from result_file import FOLDER, load_all, was_cut_short

from torchlms.bench.compare import compare_losses
from torchlms.bench.table import plain_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    Results = dict[str, dict[str, Any]]

ROOT = Path(__file__).resolve().parent.parent
_GIB = 2**30
_NOTHING = "*No results yet.*"


def write_tables(folder: Path = FOLDER, root: Path = ROOT) -> list[Path]:
    """Put the tables between their marks; returns the files that changed."""
    changed = []
    for path, texts in tables(folder, root).items():
        before = after = path.read_text()
        for mark, text in texts.items():
            after = between_marks(after, mark, text)
        if after != before:
            path.write_text(after)
            changed.append(path)
    return changed


def tables(folder: Path = FOLDER, root: Path = ROOT) -> dict[Path, dict[str, str]]:
    """What stands between which marks of which file."""
    results = load_all(folder)
    return {
        root / "README.md": {"figures": short_table(results)},
        root / "benchmarks" / "README.md": {
            "figures": long_tables(results),
            "hardware": hardware(results),
            "suites": suites.markdown(suites.load(folder / suites.FILE.name)),
        },
    }


def between_marks(text: str, mark: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- mark -->`` and ``<!-- /mark -->``."""
    pattern = re.compile(rf"(<!-- {mark} -->\n).*?(\n?<!-- /{mark} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"no <!-- {mark} --> ... <!-- /{mark} -->")
    return pattern.sub(lambda found: f"{found[1]}{content.rstrip()}\n<!-- /{mark} -->", text, count=1)


# -- README ----------------------------------------------------------------------------------------


# What README shows of all: a little too much, twice and four times too much, one sample, language models,
# and no GPU at all.
FRONT = (
    "joint-resnet50-b200",
    "joint-resnet50-b400",
    "joint-resnet50-b800",
    "joint-googlenet-8192",
    "joint-llama-24",
    "joint-bert-large-25",
    "cpu-transformer",
)


def short_table(results: Results) -> str:
    """The figures that a reader wants first."""
    parts = []
    front = {name: results[name] for name in FRONT if name in results}
    for device, group in _by_device(front).items():
        rows = [_short_row(result) for result in group.values()]
        columns = (
            "case",
            "plain, no cap",
            "with LMS",
            "of plain",
            "of the best¹",
            "`save_on_cpu`",
            "`checkpoint`",
            "peak",
        )
        parts += [f"**{_where(device, group)}**", "", *markdown(columns, rows), ""]
    if not parts:
        return _NOTHING
    parts += [
        "Images, samples or tokens per second, medians; losses of plain and LMS equal to the last bit unless "
        "said. "
        "¹ The best step that the simulator finds for this budget, if every byte of it could be used. "
        "Peak: reserved by the caching allocator; on the CPU, bytes of live tensors. "
        "All that was measured, with what was predicted: [benchmarks](benchmarks/README.md).",
    ]
    return "\n".join(parts)


def _short_row(result: dict[str, Any]) -> list[str]:
    figures, lms = result["figures"], _entry(result, "lms")
    needs = _need(result)
    label = result["label"] + (f" (plain needs {needs})" if needs else "")
    if figures.get("same_bits") is False:
        label += ", **not the same bits**"
    return [
        label,
        _rate(_entry(result, "none")),
        _rate(lms),
        _ratio(figures.get("of_plain")),
        "fits" if lms and lms.get("state") == "aside" else _ratio(figures.get("of_best")),
        _rival(result, "save_on_cpu"),
        _rival(result, "checkpoint"),
        _peak(result, lms),
    ]


def _note_of(result: dict[str, Any]) -> str:
    """What is said of a row that is not one of the table."""
    return ladder.note(result) if result["definition"]["kind"] == "ladder" else _convolution_note(result)


def _convolution_note(result: dict[str, Any]) -> str:
    figures = result["figures"]
    batches = figures.get("batches")
    if not batches:
        return ""
    sizes = " and ".join(way.removeprefix("lms-") for way in batches)
    count = sum(batch["bits_compared"] for batch in batches.values())
    differ = sum(len(batch["bits_differ"]) for batch in batches.values())
    bits = f"all {count} checksums of their results" if not differ else f"**{differ} of {count}** checksums"
    text = (
        f"Convolutions of ResNet-50, batch {sizes}, after {result['definition']['steps']} planned steps "
        "under the cap, against a process that has run nothing else: slowest "
        f"{figures['max_slowdown']:.2f} of the "
        f"uncapped time, all together {figures['total_slowdown']:.2f}; {bits} "
        f"{'are the same' if not differ else 'differ'}."
    )
    starved = figures.get("starved_on_purpose")
    if starved:
        worst = max(starved["forward_slowdown"], starved["backward_slowdown"])
        text += f" One starved on purpose takes {worst:.1f} times as long"
        text += " and gives other bits." if starved["bits_differ"] else "."
    return text


# -- benchmarks/README -----------------------------------------------------------------------------


def long_tables(results: Results) -> str:
    """Speed with rivals, memory and prediction, and each target, met or not."""
    if not results:
        return _NOTHING
    parts: list[str] = []
    for device, group in _by_device(results).items():
        training = [result for result in group.values() if _training(result)]
        parts += [f"### {_where(device, group)}", ""]
        if training:
            columns = ("case", "way", "rate", "step, ms (fastest to slowest)", "of plain", "peak", "note")
            parts += [*markdown(columns, [row for result in training for row in _way_rows(result)]), ""]
            parts += ["What was predicted, and what came of it:", ""]
            parts += [*markdown(_PREDICTED, [_predicted_row(result) for result in training]), ""]
        parts += [f"{note}\n" for result in group.values() if (note := _note_of(result))]
    parts += ["### Targets", "", *markdown(("case", "figure", "target", "found", ""), _target_rows(results))]
    return "\n".join(parts)


_PREDICTED = (
    "case",
    "peak allocated, GiB",
    "peak reserved, GiB",
    "step, ms",
    "pinned, GiB",
    "host memory at most, GiB",
    "out and in per step, GiB",
    "evictions while timed, new plans, starved convolutions",
    "recording, s",
    "planning, s",
    "launching an op, µs",
    "losses",
)


def _way_rows(result: dict[str, Any]) -> Iterable[list[str]]:
    names = {
        "none": "plain",
        "none_again": "plain, after LMS",
        "lms": "**LMS**",
        "none_capped": "plain, capped",
    }
    for entry in result["entries"]:
        first = _link(result) if entry is result["entries"][0] else ""
        name = names.get(entry["way"], f"`{entry['way']}`")
        if "error" in entry:
            yield [first, name, "-", "-", "-", "-", _escaped(entry["error"])]
            continue
        step = entry["step_s"]
        of_plain = result["figures"].get(f"{entry['way']}_of_plain")
        if entry["way"] == "lms":
            of_plain = result["figures"].get("of_plain")
        yield [
            first,
            name,
            f"{_rate(entry)} {entry['unit']}/s",
            f"{step['median'] * 1e3:.1f} ({step['min'] * 1e3:.1f} to {step['max'] * 1e3:.1f})",
            _ratio(of_plain),
            _peak(result, entry),
            _note(result, entry),
        ]


def _note(result: dict[str, Any], entry: dict[str, Any]) -> str:
    if entry["way"] == "none" and entry.get("need_over_cap"):
        return f"batch {entry['batch_size']}: {entry['need_over_cap']:.2f} of the cap"
    if entry["way"] == "lms" and entry.get("state") == "aside":
        return "stepped aside"
    notes = []
    if entry["way"] == "lms" and result["figures"].get("of_best"):
        notes.append(f"{result['figures']['of_best']:.3f} of the best ({entry['best_s'] * 1e3:.1f} ms)")
        if result["figures"].get("of_plain_waited"):
            notes.append(f"{result['figures']['of_plain_waited']:.3f} of plain where each step is waited for")
        return "; ".join(notes)
    if result["figures"].get(f"{entry['way']}_fits") is False:
        budget_bytes = (_entry(result, "lms") or {}).get("budget_bytes", 0)
        notes.append(f"does not fit in {budget_bytes / _GIB:.1f} GiB")
    elif entry["way"] != "lms" and entry.get("peak_host_bytes"):
        notes.append(f"{entry['peak_host_bytes'] / _GIB:.1f} GiB pinned")
    plain = _entry(result, "none")
    if plain is not None and entry["way"] not in ("none", "lms") and entry.get("losses"):
        count = min(len(plain["losses"]), len(entry["losses"]))
        first = compare_losses(entry["losses"][:count], plain["losses"][:count]).first_difference
        if first is not None:
            notes.append(f"other losses from step {first} on")
    return "; ".join(notes)


def _predicted_row(result: dict[str, Any]) -> list[str]:
    lms = _entry(result, "lms")
    if lms is None:
        return [_link(result)] + ["-"] * (len(_PREDICTED) - 1)
    predicted = lms.get("predicted") or {}
    figures = result["figures"]
    aside = lms.get("state") == "aside"
    cuda = result["device"] == "cuda"
    out = lms.get("bytes_out_per_step", 0) / _GIB
    back = lms.get("bytes_in_per_step", 0) / _GIB
    identity = figures.get("identity")
    timed = lms.get("while_timed") or {}
    reserved = "-"
    if cuda and not aside:
        reserved = _pair(predicted.get("peak_reserved_bytes"), lms["peak_reserved_bytes"], _GIB, ".2f")
    return [
        _link(result),
        _pair(predicted.get("peak_device_bytes"), lms["peak_device_bytes"], _GIB, ".2f"),
        reserved,
        _pair(predicted.get("step_s"), lms["step_s"]["median"], 1e-3, ".1f"),
        _pair(predicted.get("arena_bytes"), lms["host_pinned_bytes"], _GIB, ".2f") if cuda and out else "-",
        f"{lms['peak_host_bytes'] / _GIB:.1f}" if cuda and lms.get("peak_host_bytes") else "-",
        f"{out:.2f}, {back:.2f}",
        f"{timed.get('reclaims', 0)}, {lms.get('replans', 0)}, {lms.get('starved_convolutions', 0)}",
        f"{lms.get('record_s', 0):.1f}",
        f"{lms.get('plan_s', 0):.2f}",
        f"{lms['launch_s'] * 1e6:.1f}" if lms.get("launch_s") else "-",
        "-" if identity is None else _identity(identity),
    ]


def _identity(identity: dict[str, Any]) -> str:
    if identity["first_difference"] is None:
        return f"same over {identity['steps']}"
    return f"**differ** from step {identity['first_difference']} of {identity['steps']}"


def _target_rows(results: Results) -> Iterable[list[str]]:
    for result in results.values():
        for index, check in enumerate(result["targets"]):
            yes_or_no = isinstance(check["value"], bool) or check["target"] == ">= 1"
            target = "yes" if yes_or_no else check["target"]
            first = _link(result) if index == 0 else ""
            yield [
                first,
                check["figure"].replace("_", " "),
                target,
                _found(result, check),
                {True: "met", False: "**missed**", None: ""}[check["met"]],
            ]


def _found(result: dict[str, Any], check: dict[str, Any]) -> str:
    value = check["value"]
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "not measured" if check["met"] is None else _nothing_there(result, check["figure"])
    left = result["figures"].get("rivals_not_measured") if check["figure"] == "over_rivals" else None
    return f"{value:.3f}" + (f", {' and '.join(left)} not measured" if left else "")


def _nothing_there(result: dict[str, Any], figure: str) -> str:
    """Why a target is met, or missed, although there is no figure."""
    if result["figures"].get("lms_failed"):
        return "LMS ended in an error"
    if figure == "host_over_out":
        pinned_bytes = (_entry(result, "lms") or {}).get("host_pinned_bytes", 0)
        return "nothing moves" + (f", {pinned_bytes / _GIB:.1f} GiB pinned" if pinned_bytes else "")
    return "no rival that was tried runs within the budget" if figure == "over_rivals" else "it does not fit"


def hardware(results: Results) -> str:
    """One line for each kind of machine and software."""
    lines: dict[str, None] = {}
    for result in results.values():
        host, machine = result["host"], result.get("machine") or {}
        parts = [f"{result['device_name']}, torch {result['torch']}"]
        if result["device"] == "cuda":
            parts.append(f"CUDA {result['cuda']}, cuDNN {result['cudnn']}, driver {result['driver']}")
        parts.append(f"Python {result['python']}")
        parts.append(
            f"{host['cpus']} CPUs ({host['cpu']}), {host['ram_bytes'] / _GIB:.0f} GiB of host memory"
        )
        parts += _rates(machine)
        lines.setdefault("- " + "; ".join(parts))
    return "\n".join(lines) or "*Filled in from the result files.*"


def _rates(machine: dict[str, Any]) -> list[str]:
    found = []
    link = machine.get("link")
    if link:
        point = link[-1]
        out, back = (point["size_bytes"] / point[name] / 1e9 for name in ("out_s", "in_s"))
        found.append(f"link {out:.0f} GB/s out and {back:.0f} GB/s in")
    if machine.get("disk_write_bytes_per_s"):
        write, read = (machine[f"disk_{name}_bytes_per_s"] / 1e9 for name in ("write", "read"))
        found.append(f"disk {write:.1f} GB/s out and {read:.1f} GB/s in")
    return found


# -- the end of a run ------------------------------------------------------------------------------


def text_table(results: Results) -> list[str]:
    """All entries, for a terminal."""
    rows = []
    for name, result in results.items():
        for entry in result["entries"]:
            if "error" in entry:
                rows.append([name, entry["way"], "-", "-", "-", entry["error"][:60]])
            elif "step_s" in entry:
                of_plain = result["figures"].get(
                    "of_plain" if entry["way"] == "lms" else f"{entry['way']}_of_plain"
                )
                rows.append(
                    [
                        name,
                        entry["way"],
                        f"{entry['step_s']['median'] * 1e3:.1f} ms",
                        _ratio(of_plain),
                        _peak(result, entry),
                        _note(result, entry).replace("**", ""),
                    ]
                )
            else:
                rows.append([name, entry["way"], "-", "-", "-", ""])
    return plain_table(("row", "way", "step", "of plain", "peak", "note"), rows) if rows else []


def targets_lines(results: Results) -> list[str]:
    """Targets that are missed or not measured, one line each."""
    lines = []
    for name, result in results.items():
        for check in result["targets"]:
            if check["met"] is not True:
                lines.append(f"{name}: {check['figure']} {_found(result, check)}, target {check['target']}")
    return lines or (["all targets met"] if results else [])


# -- cells -----------------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    line: Callable[[Sequence[str]], str] = lambda cells: "| " + " | ".join(cells) + " |"  # noqa: E731
    return [line(columns), "|" + " --- |" * len(columns), *map(line, rows)]


def _by_device(results: Results) -> dict[str, Results]:
    groups: dict[str, Results] = {}
    for name, result in results.items():
        groups.setdefault(result["device_name"], {})[name] = result
    return dict(sorted(groups.items(), key=lambda group: next(iter(group[1].values()))["device"] != "cuda"))


def _where(device: str, group: Results) -> str:
    budgets = {result["definition"]["options"].get("budget") for result in group.values()} - {None}
    torch = ", ".join(sorted({result["torch"] for result in group.values()}))
    if all(result["device"] == "cpu" for result in group.values()):
        return f"No GPU ({device}), budget 60% of what plain needs, torch {torch}"
    caps = ", ".join(sorted(budgets)).replace("GiB", " GiB") or "a share of what plain needs"
    return f"{device}, capped at {caps}, torch {torch}"


def _training(result: dict[str, Any]) -> bool:
    return result["definition"]["kind"] not in ("convolutions", "ladder")


def _entry(result: dict[str, Any], way: str) -> dict[str, Any] | None:
    return next((e for e in result["entries"] if e["way"] == way and "error" not in e), None)


def _link(result: dict[str, Any]) -> str:
    return f"[{result['label']}](results/{result['row']}.json)"


def _need(result: dict[str, Any]) -> str:
    plain = _entry(result, "none")
    if plain is None:
        return ""
    name = "whole_run_reserved_bytes" if result["device"] == "cuda" else "peak_device_bytes"
    return f"{plain[name] / _GIB:.1f} GiB"


def _peak(result: dict[str, Any], entry: dict[str, Any] | None) -> str:
    """Reserved on CUDA, by the ledger on the CPU; over the whole run for LMS, whose budget binds it all."""
    if entry is None:
        return "-"
    prefix = "whole_run" if entry["way"] == "lms" else "peak"
    size_bytes = entry[f"{prefix}_{'reserved' if result['device'] == 'cuda' else 'device'}_bytes"]
    return f"{size_bytes / _GIB:.2f} GiB" if size_bytes else "-"


def _rate(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "-"
    rate = entry["items_per_s"]
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.1f}" if rate >= 10 else f"{rate:.2f}"


def _rival(result: dict[str, Any], way: str) -> str:
    entry = next((entry for entry in result["entries"] if entry["way"] == way), None)
    if entry is not None and "error" in entry:
        if was_cut_short(entry):
            return "cut short"
        return "out of memory" if "out of memory" in entry["error"].lower() else "fails"
    unfit = result["figures"].get(f"{way}_fits") is False
    return f"{_rate(entry)}, too large ({_peak(result, entry)})" if unfit else _rate(entry)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pair(predicted: float | None, measured: float, unit: float, form: str) -> str:
    if not predicted:
        return "-"
    return f"{predicted / unit:{form}} → {measured / unit:{form}} ({measured / predicted - 1:+.1%})"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")[:160]
