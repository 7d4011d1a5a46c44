"""Result file: what is committed of a row, the figures that follow from it, and when it is out of date."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convolutions import compare
from ladder import ladder_figures
from rows import IDENTITY_STEPS, ROWS, Kind, Row, Target

from torchlms.bench import provenance
from torchlms.bench.compare import compare_losses
from torchlms.bench.networks import source

SCHEMA = "torchlms.result/1"
FOLDER = Path(__file__).resolve().parent / "results"

CUT_SHORT = "no result in"  # so begins the error of an entry that ran out of the time it was given

_HERE = Path(__file__).resolve().parent
_FACTS = ("device", "device_name", "torch")  # entries of one file agree in these
# Targets that are met where there is nothing to compare with, and the figure that says so.
_NOTHING_THERE = {"over_rivals": "no_rival_fits", "host_over_out": "nothing_moves"}


def driver_hash(row: Row) -> str:
    """SHA-256 of the sources beside this one that measure the row."""
    own = {Kind.CONVOLUTIONS: ["convolutions.py"], Kind.LADDER: ["ladder.py"]}
    names = ["training.py", *own.get(row.kind, [])]
    return hashlib.sha256(b"\0".join((_HERE / name).read_bytes() for name in names)).hexdigest()


@dataclass(frozen=True, slots=True)
class Code:
    """The code as it is now: what LMS runs of a row depend on, what plain runs and rivals depend on."""

    lms: str
    rivals: str
    driver: str

    @staticmethod
    def now(row: Row) -> Code:
        rivals = provenance.code_hash(parts=provenance.RIVAL_PARTS)
        return Code(provenance.code_hash(), rivals, driver_hash(row))

    def stamp(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The entry with its date and this code."""
        code = self.lms if entry.get("lms") else self.rivals
        return {**entry, "date": provenance.now(), "code": code, "driver": self.driver}

    def made(self, entry: dict[str, Any]) -> bool:
        code = self.lms if entry.get("lms") else self.rivals
        return bool(entry.get("code") == code and entry.get("driver") == self.driver)


def load(path: Path) -> dict[str, Any] | None:
    """The result in ``path``, None if there is none."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and result.get("schema") == SCHEMA else None


def load_current(row: Row, path: Path) -> dict[str, Any] | None:
    """The result in ``path`` without the entries that other code made."""
    result = load(path)
    if result is not None:
        code = Code.now(row)
        result["entries"] = [entry for entry in result["entries"] if code.made(entry)]
    return result


def load_all(folder: Path) -> dict[str, dict[str, Any]]:
    """All results in a folder, in the order of the registry."""
    found = {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
    order = list(ROWS)
    names = sorted(found, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: result for name in names if (result := found[name]) is not None}


def save(result: dict[str, Any], path: Path) -> None:
    """Written beside, then moved into place: a file that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(as_text(result))
    beside.replace(path)


def as_text(result: dict[str, Any]) -> str:
    """JSON with the innermost lists and objects on one line each."""
    lines = json.dumps(result, indent=1)
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: re.sub(r"\n\s*", " ", found[0]), lines) + "\n"


def merged(
    row: Row,
    old: dict[str, Any] | None,
    facts: dict[str, Any],
    flags: dict[str, Any],
    entry: dict[str, Any],
) -> dict[str, Any]:
    """The row's result with this entry, which replaces one of the same way.

    The others stay if the row's definition, the device and torch are the same; what was measured of the
    machine, if the latter two are.
    """
    definition = row.definition()
    kept: list[dict[str, Any]] = []
    if old is not None and any(old.get(name) != facts.get(name) for name in _FACTS):
        old = None
    if old is not None and old.get("definition") == definition:
        kept = [other for other in old["entries"] if other["way"] != entry["way"]]
    everything = [*kept, entry]
    machine = entry.get("machine") or (old or {}).get("machine")
    for one in everything:
        one.pop("machine", None)
    found = figures(row, everything)
    return {
        "schema": SCHEMA,
        "row": row.name,
        "label": row.label,
        "proves": row.proves,
        "command": f"python benchmarks/run.py {row.name}",
        "date": provenance.now(),
        **facts,
        "model_source": source(row.options.model),
        "definition": definition,
        "flags": flags,
        "machine": machine,
        "figures": found,
        "targets": checks(row, found),
        "entries": sorted(everything, key=lambda one: _order(row, one["way"])),
        "code": provenance.code_hash(),
        "code_files": {name: text[:12] for name, text in provenance.code_files().items()},
    }


def _order(row: Row, way: str) -> int:
    ways = ["before", "starved", "none", "lms", "none_again"] + [rival.way.value for rival in row.rivals]
    return ways.index(way) if way in ways else len(ways)


# -- what follows from the entries -----------------------------------------------------------------


def figures(row: Row, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios, errors of prediction and yes-or-no figures, as far as there are entries for them."""
    done = {entry["way"]: entry for entry in entries if "error" not in entry}
    if row.kind is Kind.CONVOLUTIONS:
        return _convolution_figures(done)
    if row.kind is Kind.LADDER:
        return ladder_figures(done, cuda=row.cuda, identity_steps=IDENTITY_STEPS)
    found: dict[str, Any] = {}
    plain, lms = done.get("none"), done.get("lms")
    if plain is not None:
        again = done.get("none_again")
        plain_s = plain["step_s"]["median"]
        if again is not None and not row.cuda:  # machines of few cores are disturbed for minutes
            plain_s = min(plain_s, again["step_s"]["median"])
        for way, entry in done.items():
            if way != "none":
                found[f"{way}_of_plain"] = plain_s / entry["step_s"]["median"]
        if again is not None:
            found["plain_repeats_its_bits"] = _identity(again, plain)["first_difference"] is None
        if "fixed_share" in plain:
            found["fixed_below_half"] = plain["fixed_share"] < 0.5
    if lms is None:
        if any(entry["way"] == "lms" and _failed(entry) for entry in entries):
            found["lms_failed"] = True
        return found
    if plain is not None:
        found["of_plain"] = found.pop("lms_of_plain")
        if "waited_s" in plain and "waited_s" in lms:
            found["of_plain_waited"] = plain["waited_s"] / lms["waited_s"]
        found["identity"] = identity = _identity(lms, plain)
        found["same_bits"] = identity["first_difference"] is None and identity["steps"] >= IDENTITY_STEPS
    found |= _rival_figures(row, entries, lms)
    if "save_on_cpu" in done:
        found["over_save_on_cpu"] = done["save_on_cpu"]["step_s"]["median"] / lms["step_s"]["median"]
    if lms.get("best_s"):
        found["of_best"] = lms["best_s"] / lms["step_s"]["median"]
    found |= _memory_figures(row, lms)
    if "dispatch_mode" in lms:
        found["nothing_installed"] = lms["state"] == "aside" and not (
            lms["dispatch_mode"] or lms["saved_tensor_hooks"] or lms["submodule_hooks"]
        )
    return found


def _rival_figures(row: Row, entries: list[dict[str, Any]], lms: dict[str, Any]) -> dict[str, Any]:
    """LMS beside the fastest rival that stays within its budget; one that fails or needs more is none."""
    # Without the cap a rival keeps memory that it could give back: that says nothing of how it does with it.
    measured = {
        entry["way"]: entry
        for entry in entries
        if not was_cut_short(entry) and ("error" in entry or entry.get("cap_bytes"))
    }
    ways = [rival.way.value for rival in row.rivals]
    found: dict[str, Any] = {}
    seconds = []
    for way in ways:
        entry = measured.get(way)
        if entry is None or "error" in entry:
            continue
        if entry["peak_reserved_bytes"] > lms["budget_bytes"]:
            found[f"{way}_fits"] = False
        else:
            seconds.append(entry["step_s"]["median"])
    left = [way for way in ways if way not in measured]
    if left:
        found["rivals_not_measured"] = left
    if seconds:
        found["over_rivals"] = min(seconds) / lms["step_s"]["median"]
    elif ways and not left:
        found["no_rival_fits"] = True
    return found


def _failed(entry: dict[str, Any]) -> bool:
    """Whether it ended in an error of its own."""
    return "error" in entry and not was_cut_short(entry)


def was_cut_short(entry: dict[str, Any]) -> bool:
    """Whether it was given too little time, which says nothing of how it would have ended."""
    return str(entry.get("error", "")).startswith(CUT_SHORT)


def _memory_figures(row: Row, lms: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    peak = "whole_run_reserved_bytes" if row.cuda else "whole_run_device_bytes"
    found["within_budget"] = lms[peak] <= lms["budget_bytes"]
    predicted = lms.get("predicted") or {}
    if predicted:
        found["peak_error"] = _error(lms["peak_device_bytes"], predicted["peak_device_bytes"])
        found["step_error"] = _error(lms["step_s"]["median"], predicted["step_s"])
        if row.cuda:
            found["reserved_error"] = _error(lms["peak_reserved_bytes"], predicted["peak_reserved_bytes"])
    out_bytes = lms.get("bytes_out_per_step")
    if row.cuda and out_bytes:
        found["host_over_out"] = lms["host_pinned_bytes"] / out_bytes
    elif out_bytes == 0:
        found["pinned_in_vain" if row.cuda and lms["host_pinned_bytes"] else "nothing_moves"] = True
    return found


def _convolution_figures(done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    before = done.get("before")
    after = {way: entry for way, entry in done.items() if way.startswith("lms-")}
    found: dict[str, Any] = {}
    if after:
        found["starved_convolutions"] = sum(entry["starved_convolutions"] for entry in after.values())
    if before is None or not after:
        return found
    batches = {
        way: compare(before["batches"][way.removeprefix("lms-")], entry["convolutions"])
        for way, entry in after.items()
    }
    found["batches"] = batches
    found["max_slowdown"] = max(batch["max_slowdown"] for batch in batches.values())
    found["total_slowdown"] = max(batch["total_slowdown"] for batch in batches.values())
    found["same_bits"] = not any(batch["bits_differ"] for batch in batches.values())
    starved = done.get("starved")
    if starved is not None:
        first = next(iter(before["batches"].values()))
        was = next(one for one in first if one["convolution"] == starved["convolution"])
        found["starved_on_purpose"] = {
            "convolution": starved["convolution"],
            "forward_slowdown": starved["forward_s"] / was["forward_s"],
            "backward_slowdown": starved["backward_s"] / was["backward_s"],
            "bits_differ": [name for name, bits in was["bits"].items() if starved["bits"][name] != bits],
        }
    return found


def _identity(ours: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    steps = min(len(ours["losses"]), len(plain["losses"]))
    identity = compare_losses(ours["losses"][:steps], plain["losses"][:steps])
    return {"with": "none", "steps": steps, "first_difference": identity.first_difference}


def _error(measured: float, predicted: float) -> float:
    return abs(measured / predicted - 1) if predicted else float("inf")


def checks(row: Row, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target beside its figure; ``met`` is None where that is not known yet."""
    return [
        {
            "figure": target.figure,
            "target": str(target),
            "value": found.get(target.figure),
            "met": _met(target, found),
        }
        for target in row.targets
    ]


def _met(target: Target, found: dict[str, Any]) -> bool | None:
    value = found.get(target.figure)
    if found.get("lms_failed") or (target.figure == "host_over_out" and found.get("pinned_in_vain")):
        return False
    if value is None:
        return True if found.get(_NOTHING_THERE.get(target.figure, "")) else None
    if target.figure == "over_rivals" and target.met(value) and found.get("rivals_not_measured"):
        return None  # the one that is left may be faster
    return target.met(value)


# -- out of date -----------------------------------------------------------------------------------


def why_stale(name: str, result: dict[str, Any]) -> str:
    """What has changed since the result was made; empty if nothing that it depends on."""
    row = ROWS.get(name)
    if row is None:
        return "no such row any more"
    if result.get("definition") != row.definition():
        return "the row's definition has changed"
    code = Code.now(row)
    old = [entry["way"] for entry in result["entries"] if not code.made(entry)]
    if not old:
        return ""
    now = {file: text[:12] for file, text in provenance.code_files().items()}
    then = result.get("code_files", {})
    changed = sorted(file for file in {*now, *then} if now.get(file) != then.get(file))
    if any(entry.get("driver") != code.driver for entry in result["entries"]):
        changed.append("benchmarks/")
    return f"{', '.join(old)}: {', '.join(changed) or 'code'} changed"
