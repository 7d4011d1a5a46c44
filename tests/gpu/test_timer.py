"""Op times are those of the device, however slow the program is."""

from __future__ import annotations

import time

import pytest
import torch

from torchlms.eager.timer import OpTimer
from torchlms.memory.device import CudaDevice

pytestmark = pytest.mark.gpu
OPS = 20


def test_a_slow_program_does_not_lengthen_the_ops() -> None:
    """The program takes 0.5 ms from an op's first mark to the op, which itself takes a fraction of that."""
    device = CudaDevice(torch.device("cuda", 0))
    ours = torch.zeros(16 << 20, device="cuda")
    ours.add_(1)
    torch.cuda.synchronize()
    timer = OpTimer(device)
    for _ in range(OPS):
        timer.begin()
        time.sleep(5e-4)
        ours.add_(1)
        timer.end("add")
    times_s = sorted(time_s for _, time_s in timer.times())
    assert len(times_s) == OPS
    assert times_s[OPS * 9 // 10 - 1] < 2.5e-4
