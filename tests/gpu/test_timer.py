"""Op times are those of the device, however slow the program is."""

from __future__ import annotations

import time

import pytest
import torch

import torchlms
from torchlms.eager.timer import OpTimer
from torchlms.memory.device import CudaDevice

pytestmark = pytest.mark.gpu
OPS = 40


def test_a_slow_program_does_not_lengthen_the_ops() -> None:
    """From an op's first mark to the op the program takes several times as long as the op itself."""
    device = CudaDevice(torch.device("cuda", 0))
    ours = torch.zeros(16 << 20, device="cuda")
    ours.add_(1)
    torch.cuda.synchronize()
    timer = OpTimer(device)
    for _ in range(OPS):
        timer.begin()
        time.sleep(1e-4)
        ours.add_(1)
        timer.end("add")
    times_s = sorted(time_s for _, time_s in timer.times())
    assert len(times_s) == OPS
    assert times_s[OPS * 3 // 4] < 9e-5


def test_a_recorded_op_does_not_take_as_long_as_its_launch() -> None:
    """The device waits for a program that records; each op is short."""
    weight = torch.nn.Parameter(torch.ones(1 << 20, device="cuda"))
    holder = torch.nn.Module()
    holder.weight = weight
    with torchlms.LMS(holder, budget="2GiB") as lms:
        for _ in range(2):
            x = weight
            for _ in range(OPS):
                x = x * x
            x.sum().backward()
            if lms.tape is not None:
                break
        assert lms.tape is not None
    times_s = sorted(op.time_s for op in lms.tape.ops if op.name == "aten.mul.Tensor")
    assert len(times_s) >= OPS
    assert times_s[len(times_s) // 2] < 1.5e-5, "4 MiB that are read and written take some 4 us"
