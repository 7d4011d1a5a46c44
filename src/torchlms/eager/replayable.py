"""Replayable: which ops may run a second time in place of keeping their results."""

from __future__ import annotations

from typing import Any

_PURE = frozenset(
    (
        *("relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "tanh", "hardtanh", "hardtanh_", "leaky_relu"),
        *("add", "add_", "sub", "mul", "mul_", "div", "neg", "exp", "rsqrt", "pow", "clone", "_to_copy"),
        *("_softmax", "_log_softmax", "native_layer_norm", "native_group_norm", "cat", "elu"),
        *("native_batch_norm", "cudnn_batch_norm", "avg_pool2d", "max_pool2d_with_indices"),
    )
)


def may_replay(func: Any, device_type: str) -> bool:
    """Whether ``func`` has been shown to give the same bits again on such a device."""
    del device_type
    return getattr(func, "_opname", "") in _PURE
