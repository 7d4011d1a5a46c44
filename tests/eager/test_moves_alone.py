"""What a run that moves alone does not come to: a change there leaves its figures as they are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from sessions import DROPPING, SMALL, plain_peak, run_lms
from small_networks import NETWORKS

import torchlms
from torchlms.bench.provenance import NOT_FOR_MOVES

PACKAGE = Path(torchlms.__file__).parent
ON_AND_OFF = {"hand_back_leaves", "_no_more"}


@pytest.mark.parametrize("recompute", [False, True])
def test_it_never_comes_to_what_makes_values_again(recompute: bool, spill_dir: Path) -> None:
    files = {str(PACKAGE / name) for name in NOT_FOR_MOVES}
    called: set[str] = set()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename in files:
            called.add(frame.f_code.co_name)

    network = NETWORKS["resnet"]
    budget_bytes = int(0.6 * plain_peak(network))
    sys.setprofile(look)
    try:
        watched = run_lms(network, budget_bytes, spill_dir, steps=5, rules=DROPPING if recompute else SMALL)
    finally:
        sys.setprofile(None)
    assert watched.stats["plan"]["disk"]["values"] or recompute
    assert bool(called - ON_AND_OFF) is recompute
