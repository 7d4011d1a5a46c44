"""Replayable: which ops may run a second time in place of keeping their results.

The table beside this file comes from a sweep over operator samples, op by op, for each kind of device
(``python -m torchlms.sweep.command``). Schemas and tags alone do not say it. An op that the sweep has not
seen, or not on this kind of device, may not. A version of torch other than the one that was swept is
taken at the sweep's word: each recipe is tried on the user's own values before it is trusted.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torchlms.eager.per_op import PerOp

TABLE = Path(__file__).with_name("replayable.json")

_GOOD = ("pure", "in place", "seeded")
# Keep a state of their own between calls, which no sample shows.
_NEVER = ("rnn", "lstm", "gru")
# Write running statistics that no schema names, and are not given any (provenance.without_statistics).
_WITHOUT_STATISTICS = ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm")


def may_replay(func: Any, device_type: str) -> bool:
    """Whether ``func`` has been shown to give the same bits again on such a device."""
    return _answers(device_type)(func)


@functools.cache
def _answers(device_type: str) -> PerOp[bool]:
    good = _good(device_type)
    return PerOp(lambda func: str(func) in good)


@functools.cache
def _good(device_type: str) -> frozenset[str]:
    ops = json.loads(TABLE.read_text()).get(device_type, {}).get("ops", {})
    return frozenset(op for op, found in ops.items() if _is_good(op, found["verdict"]))


def _is_good(op: str, verdict: str) -> bool:
    name = op.split(".")[1]
    if any(part in name.strip("_").split("_") or part == name for part in _NEVER):
        return False
    return verdict in _GOOD or (verdict == "writes" and name in _WITHOUT_STATISTICS)
