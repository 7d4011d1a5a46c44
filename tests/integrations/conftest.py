"""Trainers run on the CPU, on one thread, with rates that nobody measures and folders of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import torchlms.api
from torchlms.core.machine import Machine

# Before any of the libraries is imported: nothing of the user's is read or written, nothing is asked for.
os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("KERAS_HOME", os.path.join(os.environ["TORCHLMS_CACHE"], "keras"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TORCHLMS_LOG", "off")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Also for what a module's tests share: the bits of a plain run depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)
