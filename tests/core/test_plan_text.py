"""The table of what moves, as text."""

from __future__ import annotations

from dataclasses import replace

from tapes import GIB, gpu, resnet

from torchlms.core.plan import Budget
from torchlms.core.planner import plan
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
