"""Repeatable kernels, and nothing cached from one test to the next."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.gpu.networks import clean


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    # The fused attention kernels add up gradients in no fixed order: plain runs differ by themselves.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cudnn.deterministic = before
    if torch.cuda.is_available():
        clean()
