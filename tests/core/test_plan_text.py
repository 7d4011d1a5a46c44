"""The table of what moves, as text."""

from __future__ import annotations

from dataclasses import replace

from tapes import GIB, gpu, resnet

from torchlms.core.plan import Budget
from torchlms.core.planner import plan
from torchlms.core.rules import Rules
from torchlms.report import plan_text


def test_names_stand_in_full() -> None:
    """They are what patterns of rules have to match."""
    tape = resnet(8)
    op, module = (
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "model.transformer.layers.11.attention",
    )
    tape = replace(tape, values=tuple(replace(value, op=op, module=module) for value in tape.values))
    made = plan(tape, gpu(), Budget(tape.values[1].size_bytes * 6, 80 * GIB, 0))
    assert made.moves
    lines = plan_text(tape, made).splitlines()
    head = next(line for line in lines if "in module" in line)
    rows = [line for line in lines if op in line]
    assert rows
    assert {(row.index(op), row.index(module)) for row in rows} == {
        (head.index("made by"), head.index("in module"))
    }


def test_a_least_size_that_cannot_be_kept_is_said() -> None:
    tape = resnet(8)
    budget = Budget(tape.values[1].size_bytes * 6, 80 * GIB, 0)
    size_bytes = max(value.size_bytes for value in tape.values) + 1
    for least_bytes, said in ((0, False), (size_bytes, True)):
        rules = Rules(min_bytes=least_bytes, recompute=False)
        text = plan_text(tape, plan(tape, gpu(), budget, rules), rules=rules)
        assert ("could not be kept" in text) is said
