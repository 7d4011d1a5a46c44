"""Report: what was decided, why, and whether it came true, as text for a terminal or a log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchlms.core.curve import peak_bytes
from torchlms.core.plan import Choice
from torchlms.core.rules import Rules, stayers
from torchlms.core.units import counted
from torchlms.memory.limits import format_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torchlms.core.plan import Plan
    from torchlms.core.tape import Tape, Value

_MOST_ROWS = 20


def report_text(
    stats: dict[str, Any],
    tape: Tape | None,
    plan: Plan | None,
    bound_s: float | None = None,
    rules: Rules | None = None,
    *,
    over: bool = False,
) -> str:
    """A few lines on how it went, then the largest values that moved and the reason for each.

    ``bound_s`` is a step time that no plan can beat, ``rules`` those that the plan had to keep to; ``over``:
    the program has ended, and the state is the one in which it did.
    """
    over = over or (stats["state"] == "off" and bool(stats["steps"]))
    lines = [_state_line(stats, over=over), *_verified(stats)]
    if plan is None and stats["steps"]:
        lines += _without_plan(stats)
    if plan is not None and tape is not None:
        lines += _comparison(stats)
        if stats.get("racing"):
            lines.append(
                "it ended while several plans were timed against each other; this was one of them"
                if over
                else "this plan is one of several that are timed against each other; the fastest will stay"
            )
        lines.append(f"with nothing moved a step like this would need {format_bytes(peak_bytes(tape))}")
        lines += _limit(stats, bound_s)
        lines += _choices(stats)
        lines += _kept(tape, plan, rules)
        lines += _moved(tape, plan)
    return "\n".join(lines)


def plan_text(tape: Tape, plan: Plan, bound_s: float | None = None, rules: Rules | None = None) -> str:
    """What a plan that was not followed yet would do and cost, and the reason for each of its choices."""
    predicted = plan.predicted
    stats = {"predicted": {"step_s": predicted.step_s}, "plan": choice_totals(tape, plan)}
    lines = [
        f"predicted peak {format_bytes(predicted.peak_device_bytes)} of "
        f"{format_bytes(plan.budget.device_bytes)} (the smallest that works, with room for what leaves, is "
        f"{format_bytes(plan.smallest_bytes)}), step {predicted.step_s * 1e3:.1f} ms, of which "
        f"{predicted.stall_s * 1e3:.1f} ms waiting; {format_bytes(predicted.bytes_out)} out and "
        f"{format_bytes(predicted.bytes_in)} in; planned in {plan.plan_s:.2f} s",
        *_limit(stats, bound_s),
        *_choices(stats),
        *_kept(tape, plan, rules),
        *_moved(tape, plan),
    ]
    return "\n".join(lines if plan.moves else [*lines, "nothing has to move"])


def choice_totals(tape: Tape | None, plan: Plan | None) -> dict[str, dict[str, int]]:
    """Values and bytes by choice, over the values that could have moved."""
    totals = {choice.value: {"values": 0, "bytes": 0} for choice in Choice}
    if tape is None:
        return totals
    chosen = {decision.value: decision.choice for decision in plan.moves} if plan is not None else {}
    for value in tape.values:
        if value.movable:
            entry = totals[chosen.get(value.id, Choice.KEEP).value]
            entry["values"] += 1
            entry["bytes"] += value.size_bytes
    return totals


def _state_line(stats: dict[str, Any], *, over: bool) -> str:
    planned = bool(stats.get("predicted"))
    explained = {
        "off": "not on",
        "record": "recording another kind of step" if planned else "recording: the plan is not made yet",
        "guard": "on, following a plan",
        "improvise": "on, without a plan: values leave as memory runs out",
        "aside": "everything fits: LMS stepped aside",
    }
    steps = stats["steps"]
    word = f"{'was' if over else 'is'} {explained[stats['state']]}"
    line = f"LMS {'has ended' if stats['state'] == 'off' and steps else word}; {counted(steps, 'step')}"
    if steps:  # an optimizer that accumulates steps more seldom
        line += " of forward and backward"
        line += f", {stats['record_steps']} of them recorded; budget {format_bytes(stats['budget_bytes'])}"
    return line


def _verified(stats: dict[str, Any]) -> list[str]:
    """What ``verify=`` found, where that was asked for. What is not whole is an error and not a line."""
    if not stats.get("verifying"):
        return []
    count, sizes = stats["verified_values"], format_bytes(stats["verified_bytes"])
    said = f"{count} values came back whole, {sizes}" if count else "no value has left and come back yet"
    return [f"verify: {said}"]


def _comparison(stats: dict[str, Any]) -> list[str]:
    predicted = stats["predicted"]
    rows = [
        (
            "peak allocated",
            format_bytes(predicted["peak_device_bytes"]),
            format_bytes(stats["peak_device_bytes"]),
        ),
        (
            "peak reserved",
            format_bytes(predicted["peak_reserved_bytes"]),
            format_bytes(stats["peak_reserved_bytes"]),
        ),
        ("step", f"{predicted['step_s'] * 1e3:.1f} ms", f"{stats['measured_step_s'] * 1e3:.1f} ms"),
    ]
    if predicted["arena_bytes"] or stats["pinned_bytes"]:
        pinned = (format_bytes(predicted["arena_bytes"]), format_bytes(stats["pinned_bytes"]))
        rows.append(("host memory", *pinned))
    lines = [f"{'':16} {'predicted':>12} {'measured':>12}"]
    lines += [f"{name:16} {before:>12} {after:>12}" for name, before, after in rows]
    return [*lines, _traffic(stats, f" ({stats['reclaims_since_plan']} of them under this plan)")]


def _without_plan(stats: dict[str, Any]) -> list[str]:
    """What is known where no plan was made."""
    return [f"no plan: peak allocated {format_bytes(stats['peak_device_bytes'])}, {_traffic(stats)}"]


def _traffic(stats: dict[str, Any], since: str = "") -> str:
    """What left and came back in a step, and what went less than smoothly."""
    out, back = format_bytes(stats["bytes_out_per_step"]), format_bytes(stats["bytes_in_per_step"])
    trouble = (
        (stats["reclaims"], f"times memory had run out and values left at once{since}"),
        (stats["retries"], "ops were run again for that"),
        (stats["late_fetches"], "values came late"),
        (stats["starved_convolutions"], "convolutions had to do without their workspace"),
    )
    said = ", ".join(f"{count} {what}" for count, what in trouble if count)
    return f"out {out} and in {back} per step{f'; {said}' if said else ''}"


def _limit(stats: dict[str, Any], bound_s: float | None) -> list[str]:
    measured_s = stats.get("measured_step_s", 0.0)
    predicted_s = stats["predicted"]["step_s"]
    if not bound_s or not predicted_s or predicted_s < bound_s or 0 < measured_s < bound_s:
        return []  # nothing is known, or the machine is faster than it was when its rates were measured
    share = bound_s / predicted_s
    return [
        f"no plan can bring this step below {bound_s * 1e3:.1f} ms within the budget; the prediction is at "
        f"{share:.2f} of that limit's speed"
    ]


def _choices(stats: dict[str, Any]) -> list[str]:
    parts = [
        f"{name} {entry['values']} ({format_bytes(entry['bytes'])})"
        for name, entry in stats["plan"].items()
        if entry["values"]
    ]
    return ["values that could move: " + ", ".join(parts)] if parts else []


def _kept(tape: Tape, plan: Plan, rules: Rules | None) -> list[str]:
    """Why what autograd saved stays on the device, by reason, most bytes first."""
    moved, ruled = {move.value for move in plan.moves}, stayers(rules or Rules(), tape)
    least_bytes = rules.min_bytes if rules is not None else 0
    reasons: dict[str, list[int]] = {}
    for value in tape.values:
        if value.saved >= 0 and value.id not in moved:
            why = why_it_stays(value, ruled, least_bytes, some_go=bool(moved))
            reasons.setdefault(why, []).append(value.size_bytes)
    found = sorted(reasons.items(), key=lambda entry: -sum(entry[1]))
    parts = [f"{len(sizes)} ({format_bytes(sum(sizes))}): {why}" for why, sizes in found]
    small = [tape.values[value].size_bytes for value in moved if tape.values[value].size_bytes < least_bytes]
    could_not = (
        [
            f"min_bytes ({format_bytes(least_bytes)}) could not be kept: nothing less makes it fit than that "
            f"{counted(len(small), 'smaller value')} ({format_bytes(sum(small))}) leave, too"
        ]
        if small
        else []
    )
    return [*(["saved values that stay: " + "; ".join(parts)] if parts else []), *could_not]


def why_it_stays(value: Value, ruled: Mapping[int, str], least_bytes: int, *, some_go: bool) -> str:
    """Why a value that could have left stays on the device, or why it could not.

    ``ruled`` are the values that a rule keeps, by id, each with that rule.
    """
    if value.why_not:
        return value.why_not
    if value.id in ruled:
        return f"kept by the rule {ruled[value.id]}"
    if value.size_bytes < least_bytes:
        return f"smaller than min_bytes ({format_bytes(least_bytes)})"
    return "it fits, and going would cost more than others that go" if some_go else "nothing has to go"


def _moved(tape: Tape, plan: Plan) -> list[str]:
    moves = sorted(plan.moves, key=lambda decision: -tape.values[decision.value].size_bytes)
    if not moves:
        return []
    shown = [(move, tape.values[move.value]) for move in moves[:_MOST_ROWS]]
    rows = [
        (
            format_bytes(value.size_bytes),
            move.choice.value,
            str(value.birth) if value.birth >= 0 else "-",
            value.op or value.kind.value,
            value.module,
            move.reason,
        )
        for move, value in shown
    ]
    # Names stand in full: they are what patterns of rules have to match.
    by = max(34, *(len(row[3]) for row in rows))
    where = max(28, *(len(row[4]) for row in rows))
    lines = [f"{'size':>10}  {'choice':9} {'at op':>6}  {'made by':{by}} {'in module':{where}} why"]
    lines += [
        f"{size:>10}  {choice:9} {at_op:>6}  {op:{by}} {module:{where}} {reason}"
        for size, choice, at_op, op, module, reason in rows
    ]
    if len(moves) > _MOST_ROWS:
        lines.append(f"... and {len(moves) - _MOST_ROWS} more; the page of `torchlms report` has every value")
    return lines
