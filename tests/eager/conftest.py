"""Tests of eager execution run on the CPU: RAM under a ledger is the device, a spill file the slow tier."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import torchlms.api
from tests.eager.known_times import know_times
from torchlms.core import joint, search
from torchlms.core.machine import Machine

os.environ.setdefault("TORCHLMS_LOG", "off")  # pytest's own handler sees it all the same


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return know_machine(monkeypatch)


def know_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The same rates everywhere, without measuring them."""
    made = Machine(
        device="cpu",
        device_bytes=16 << 30,
        torch=torch.__version__,
        disk_write_bytes_per_s=1e9,
        disk_read_bytes_per_s=1e9,
    )

    def known(*_args: Any, **_options: Any) -> Machine:
        return made

    monkeypatch.setattr(torchlms.api, "measured_machine", known)
    return made


@pytest.fixture(autouse=True)
def times(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans depend on the network, not on what else this computer has to do."""
    if request.node.get_closest_marker("real_times") is None:
        know_times(monkeypatch)


@pytest.fixture(autouse=True)
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans that are found sooner and are a little worse: what becomes of a plan is the same.

    How good they are is a matter of tests/core. Whole searches are also those of tests/runner and the demo.
    """
    monkeypatch.setattr(search, "EFFORT", search.EFFORT // 10)
    monkeypatch.setattr(joint, "SETS", joint.SETS // 3)


@pytest.fixture(autouse=True)
def log_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="torchlms")


@pytest.fixture
def spilled(spill_dir: Path) -> Path:
    """An empty directory for the spill file; after the test nothing may be left in it."""
    return spill_dir
