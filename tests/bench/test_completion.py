"""What a shell is offered for the value of an option, as the shell asks for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("bench --model res", ["resnet50", "resnet152"]),
        ("fit --model goog", ["googlenet"]),
        ("bench --compare none,save", ["none,save_on_cpu"]),
        ("bench --compare none,no", ["none,none_capped"]),
        ("bench --way l", ["lms"]),
        ("bench --rule keep_read", ["keep_read_in=", "keep_read_by="]),
        ("fit --dtype ", ["float32", "bfloat16"]),
        ("run --log d", ["debug"]),
    ],
)
def test_values(line: str, offered: list[str]) -> None:
    words = ["torchlms", *line.split(" ")]
    asked = {
        "_TORCHLMS_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    command = [sys.executable, "-m", "torchlms"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | asked, check=True, timeout=60
    )
    assert ended.stdout.split() == offered
