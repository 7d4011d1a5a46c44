"""The sweep sees through schemas, and its table says what may be replayed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from torchlms.eager import replayable
from torchlms.sweep.command import write
from torchlms.sweep.sweep import Finding, sweep
from torchlms.sweep.trial import Verdict, try_again

CPU = torch.device("cpu")
aten = torch.ops.aten


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    made = torch.library.Library("torchlms_sweep_test", "DEF")
    made.define("lies(Tensor x) -> Tensor")  # writes x and does not say so
    made.define("wanders(Tensor x) -> Tensor")  # other bits each time
    calls = [0.0]

    def lies(x: torch.Tensor) -> torch.Tensor:
        result = x.clone()
        x.fill_(7)
        return result

    def wanders(x: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return x + calls[0]

    made.impl("lies", lies, "CPU")
    made.impl("wanders", wanders, "CPU")
    yield made
    made._destroy()


X = torch.randn(4, 5)


@pytest.mark.parametrize(
    ("func", "args", "verdict"),
    [
        (aten.relu.default, (X,), Verdict.PURE),
        (aten.gelu.default, (torch.full((3,), float("nan")),), Verdict.PURE),
        (aten.relu_.default, (X.clone(),), Verdict.IN_PLACE),
        (aten.add_.Tensor, (X.clone()[1:], X[1:]), Verdict.IN_PLACE),
        (aten.view.default, (X, [20]), Verdict.VIEW),
        (aten.bernoulli.default, (torch.full((64,), 0.5),), Verdict.SEEDED),
        (
            aten.native_batch_norm.default,
            (torch.randn(8, 3, 4), None, None, torch.zeros(3), torch.ones(3), True, 0.1, 1e-5),
            Verdict.WRITES,
        ),
    ],
)
def test_verdicts(func: object, args: tuple[object, ...], verdict: Verdict) -> None:
    _, found, why = try_again(func, args, {})
    assert (found, bool(why)) == (verdict, verdict is not Verdict.PURE)


def test_ops_that_lie(library: torch.library.Library) -> None:
    del library
    assert try_again(torch.ops.torchlms_sweep_test.lies.default, (X.clone(),), {})[1] is Verdict.WRITES
    assert try_again(torch.ops.torchlms_sweep_test.wanders.default, (X.clone(),), {})[1] is Verdict.DIFFERS


def test_forward_and_backward_ops_are_seen_and_failures_passed_over() -> None:
    x = torch.randn(8, 16, requires_grad=True)

    def fails() -> None:
        F.silu(x)
        raise ValueError

    found = sweep(CPU, samples=iter([("gelu", lambda: F.gelu(x)), ("fails", fails)]))
    assert found["aten.gelu.default"].verdict is Verdict.PURE
    assert found["aten.gelu_backward.default"].verdict is Verdict.PURE
    assert "aten.silu.default" in found
    assert x.grad is not None


def test_no_more_than_there_is_time_for() -> None:
    assert sweep(CPU, samples=iter([("never", lambda: F.relu(X))]), within_s=-1) == {}


def test_the_worst_counts() -> None:
    finding = Finding(Verdict.PURE, "")
    finding.add(Verdict.DIFFERS, "other bits")
    finding.add(Verdict.PURE, "")
    assert (finding.verdict, finding.why, finding.trials) == (Verdict.DIFFERS, "other bits", 3)


def test_another_devices_part_of_the_table_stays(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"cuda": {"ops": {"aten.relu.default": {"verdict": "pure", "trials": 1}}}}))
    write(path, CPU, {"aten.silu.default": Finding(Verdict.PURE, "")})
    table = json.loads(path.read_text())
    assert table["cuda"]["ops"] == {"aten.relu.default": {"verdict": "pure", "trials": 1}}
    assert table["cpu"]["ops"]["aten.silu.default"]["verdict"] == "pure"
    assert table["cpu"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("func", "may"),
    [
        (aten.relu.default, True),
        (aten.relu_.default, True),
        (aten.native_batch_norm.default, True),  # which is given no statistics to write
        (aten.native_layer_norm.default, True),
        (aten.convolution.default, True),
        (aten.addmm.default, True),
        (aten.bernoulli_.float, True),  # from the same state of its generator
        (aten.mkldnn_rnn_layer.default, False),
        (aten.empty.memory_format, False),
        (aten.view.default, False),
    ],
)
def test_what_the_table_permits(func: object, may: bool) -> None:
    assert replayable.may_replay(func, "cpu") is may


def test_what_was_never_swept_is_not_replayed() -> None:
    assert not replayable.may_replay(aten.relu.default, "meta")
    assert not replayable.may_replay("nobody.knows.this", "cpu")
