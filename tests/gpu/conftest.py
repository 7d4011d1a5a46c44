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
    yield
    torch.backends.cudnn.deterministic = before
    if torch.cuda.is_available():
        clean()
