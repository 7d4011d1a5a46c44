"""What torch's profiler writes of two steps on a device, as far as it is read."""

from __future__ import annotations

from typing import Any


def event(category: str, name: str, begin_us: float, us: float, **args: int) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin_us, "dur": us, "tid": 1, "args": args}


# A device that is behind: step 10's last kernel runs while the program is in step 11, and step 11's after it.
BEHIND = [
    event("user_annotation", "step 10", 0, 100),
    event("user_annotation", "step 11", 100, 100),
    event("user_annotation", "Optimizer.step#SGD.step", 190, 5),
    event("cuda_runtime", "cudaLaunchKernel", 90, 2, correlation=1),
    event("cuda_runtime", "cudaLaunchKernel", 110, 2, correlation=2),
    event("cuda_runtime", "cudaMemcpyAsync", 120, 2, correlation=3),
    event("cuda_driver", "cuLaunchKernelEx", 130, 2, correlation=4),
    event("cpu_op", "aten::mm", 105, 20),
    event("kernel", "gemm of step 10", 140, 20, stream=7, correlation=1),
    event("kernel", "gemm", 200, 50, stream=7, correlation=2),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 260, 40, stream=13, correlation=3, bytes=4096),
    event("kernel", "relu", 255, 10, stream=7, correlation=4),
]
