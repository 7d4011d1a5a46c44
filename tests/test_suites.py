"""Somebody else's tests: some of each suite here, and that the instruments would see what went wrong."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import suites  # noqa: E402
from borrowed import force, passes, result, trial  # noqa: E402
from borrowed.case import Case, Subject, own, passing, subject_of  # noqa: E402
from borrowed.trial import Finding, Verdict, Ways, try_case  # noqa: E402

from torchlms.bench import provenance  # noqa: E402
from torchlms.eager import private  # noqa: E402
from torchlms.eager.slot import Slot  # noqa: E402

OPERATORS = (
    "add float64", "nn.functional.gelu float64", "nn.functional.conv2d complex128", "linalg.svd float64",
    "matmul complex128", "nn.functional.batch_norm float64", "nn.functional.dropout float64",
    "sigmoid float64 in place", "index_put float64", "cumprod float64", "logsumexp complex128",
    "nn.functional.scaled_dot_product_attention float64",
)  # fmt: skip
MODULES = (
    "nn.BatchNorm2d float32", "nn.BatchNorm2d float32 in evaluation", "nn.Conv2d float64",
    "nn.LSTM float64", "nn.GRU float32", "nn.LayerNorm float32", "nn.MultiheadAttention float32",
    "nn.TransformerEncoderLayer float32", "nn.Embedding float32", "nn.MaxPool2d float64", "nn.GELU float32",
    "nn.CrossEntropyLoss float64",
)  # fmt: skip
ARCHITECTURES = (
    "gpt2", "llama", "mixtral", "mamba2", "bert", "deberta-v2", "bart", "t5", "vit", "resnet", "wav2vec2",
    "clip",
)  # fmt: skip


def some_cases(suite: str, name: str, count: int = 1) -> list[Case]:
    group = next(group for group in suites.chosen(suite, name) if group.name.split(" (")[0] == name)
    return suites.spread(list(group.cases()), count)


def subject(function: Callable[..., Any], *args: Any) -> Subject:
    return subject_of(function, args, {}, None)


def leaf(*shape: int) -> torch.Tensor:
    torch.manual_seed(5)
    return torch.randn(*shape).requires_grad_()


@pytest.mark.parametrize("count", [4, pytest.param(8, marks=pytest.mark.more)])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name: str, count: int) -> None:
    findings = [try_case(case) for case in some_cases("operators", name, count)]
    assert {finding.verdict for finding in findings} == {Verdict.SAME}, findings
    assert any(finding.away for finding in findings) is (name != "add float64")  # which saves nothing


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str) -> None:
    finding = try_case(some_cases("modules", name)[0])
    assert finding.verdict is Verdict.SAME, finding
    assert finding.away
    assert finding.planned


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    finding = try_case(some_cases("transformers", name)[0])
    assert finding.verdict is Verdict.SAME, finding
    assert finding.planned > 10


@pytest.mark.parametrize("recompute", [False, True])
def test_under_a_tight_budget(recompute: bool) -> None:
    ways = Ways(moving=False, tight=True, recompute=recompute)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = torch.nn.functional.gelu(x) * 1.5
        return x

    finding = try_case(Case("chain", lambda: subject(chain, leaf(64, 64))), ways)
    assert finding.verdict is Verdict.SAME, finding
    assert finding.away
    assert finding.planned


def test_every_architecture_is_there_once() -> None:
    names = [group.name for group in suites.chosen("transformers")]
    assert len(names) == len(set(names)) > 150


# -- what would be seen ----------------------------------------------------------------------------


def test_one_bit_that_changes_on_the_way_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flipped in each value that comes back, whichever way it left."""
    send = Slot.send

    def send_wrong(self: Slot, *args: Any) -> None:
        assert self.bytes is not None
        with torch.no_grad(), private.unwatched():  # an op that is seen has what is due done before it
            self.bytes[0] ^= 1
        send(self, *args)

    monkeypatch.setattr(Slot, "send", send_wrong)
    for suite, name in (("operators", "sigmoid float64"), ("modules", "nn.LayerNorm float32")):
        finding = try_case(some_cases(suite, name)[0])  # of one: the first, which is not empty
        assert finding.verdict is Verdict.DIFFERS, finding
        assert "gradient of" in finding.why


def test_all_that_may_leave_is_away_and_its_memory_is_written_over(tmp_path: Path) -> None:
    made = subject(torch.sigmoid, leaf(64, 64))
    with force.forced_on(force.Force(), None, tmp_path) as lms:
        made.forward().sum()
        end = made.forward()
        edge = torch.autograd.graph.get_gradient_edge(end)
        assert force.away(lms) == 0
        del end
        force.evict(lms)
        assert force.away(lms) == 1
        del edge


def test_a_case_that_differs_from_itself() -> None:
    calls = itertools.count()
    finding = try_case(Case("counts", lambda: subject(lambda x: x * next(calls), leaf(3))))
    assert finding.verdict is Verdict.UNSTEADY
    assert finding.why.startswith("step 0: result")


def test_what_differs_under_any_mode_is_not_laid_at_our_door() -> None:
    """PyTorch's backward of masked_fill asks whether a dispatch mode is on, and then adds otherwise."""
    torch.manual_seed(0)
    mask, value = torch.rand(64, 64) < 0.5, torch.tensor(2.0, requires_grad=True)
    finding = try_case(Case("filled", lambda: subject(torch.masked_fill, leaf(64, 64), mask, value)))
    assert finding.verdict is Verdict.ANY_MODE, finding
    assert "gradient of .args[2]" in finding.why


def test_errors_are_compared_and_refusals_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("fails", lambda: subject(torch.mm, leaf(3, 4), leaf(3, 4)))
    finding = try_case(case)
    assert finding.verdict is Verdict.SAME_ERROR
    assert "cannot be multiplied" in finding.why
    monkeypatch.setattr(trial, "_BUDGET_TRIES", 1)
    refused = try_case(
        Case("large", lambda: subject(torch.relu, leaf(64, 64))), Ways(moving=False, tight=True)
    )
    assert refused.verdict is Verdict.REFUSED
    assert refused.why.startswith("BudgetTooSmall")


def test_stand_ins_keep_what_is_one_tensor_one() -> None:
    base = leaf(4)
    x = base.log()  # some samples are made by a graph of their own
    mine = own({"args": (x, [x, 3]), "kwargs": {"y": x}})
    first = mine["args"][0]
    assert first is mine["args"][1][0] is mine["kwargs"]["y"]
    assert first.is_leaf
    assert first.requires_grad
    copy = passing([first])[0]
    assert copy.grad_fn is not None
    assert copy.data_ptr() != first.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(5, 7)[:, 3:4].T,
        torch.randn(3, 3, dtype=torch.complex64).conj(),
        torch.tensor(True),
        torch.zeros(0, 3),
        torch.eye(3).to_sparse(),
        torch.randn(4, dtype=torch.bfloat16),
    ],
)
def test_bits_of_whatever_comes(tensor: torch.Tensor) -> None:
    assert passes.bits(tensor) == passes.bits(tensor.clone())
    other = tensor.to_dense().clone().zero_() if tensor.any() else torch.ones(())
    assert passes.bits(tensor) != passes.bits(other)


# -- the processes ---------------------------------------------------------------------------------


def listened(tmp_path: Path, ending: str, timeout_s: float = 60.0) -> tuple[suites.Progress, str]:
    """What is heard of a worker that begins the second of its cases and then does ``ending``."""
    told = tmp_path / "told"
    told.touch()
    lines = [
        {"groups": 3},
        {"group": 1, "first": 0, "name": "g"},
        {"begin": "g #0"},
        {"finding": {"verdict": "same bits", "away": 2}},
        {"begin": "g #1"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    code = f"import os, time; f = open({str(told)!r}, 'a'); f.write({text!r}); f.flush(); {ending}"
    progress = suites.Progress()
    process = subprocess.Popen([sys.executable, "-c", code])
    return progress, suites._listen(process, told, progress, timeout_s)


@pytest.mark.parametrize(
    ("ending", "timeout_s", "why"),
    [("os.kill(os.getpid(), 11)", 60.0, "killed by signal 11"), ("time.sleep(60)", 1.0, "no answer in 1 s")],
)
def test_a_case_that_ends_its_process_does_not_end_the_run(
    ending: str, timeout_s: float, why: str, tmp_path: Path
) -> None:
    progress, said = listened(tmp_path, ending, timeout_s)
    assert said == why
    assert not progress.done
    progress.lost(said)
    assert (progress.group, progress.case, len(progress.findings)) == (1, 1, 1)  # it is tried once more
    progress.take({"begin": "g #1"})
    progress.lost(said)
    assert progress.findings["g #1"] == {"verdict": "ended", "why": why}
    assert (progress.groups, progress.group, progress.case) == (3, 1, 2)  # where the next one begins


def test_some_cases_are_from_all_over() -> None:
    assert suites.spread(list(range(100)), 4) == [0, 25, 50, 75]
    assert suites.spread([1, 2, 3], 4) == suites.spread([1, 2, 3], 0) == [1, 2, 3]


def test_samples_that_cannot_be_made_cost_one_group() -> None:
    progress = suites.Progress()
    progress.take({"group": 4, "first": 0, "name": "bad samples"})
    for _ in range(2):
        progress.lost("killed by signal 11")
    assert (progress.group, progress.case) == (5, 0)
    assert list(progress.findings) == ["bad samples"]


@pytest.mark.more
def test_a_suite_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "suites.json"
    arguments = ["operators", "--only", "sigmoid float64", "--most", "2", "--out", str(path)]
    assert suites.main(arguments) == 0
    assert "operators" in capsys.readouterr().out
    made = result.load(path)["operators"]
    assert made["counts"]["same bits"] == made["cases"] >= 2
    assert 0 < made["moved"] == made["planned"] < made["cases"]  # some samples are empty
    assert made["others"] == []
    assert made["command"] == "python benchmarks/suites.py operators --only 'sigmoid float64' --most 2"
    assert result.why_stale(made) == ""
    assert provenance.stale_results(tmp_path) == []


# -- the file --------------------------------------------------------------------------------------


def sample() -> dict[str, Any]:
    findings = {
        "relu float64 #0": Finding(Verdict.SAME, away=1, planned=1),
        "prod float64 #0": Finding(Verdict.ANY_MODE, "step 0: gradient", away=1),
        "prod float64 #1": Finding(Verdict.ANY_MODE, "step 0: gradient"),
        "cov float64 #0": Finding(Verdict.DIFFERS, "step 1: result"),
    }
    return result.part(
        "operators", "python benchmarks/suites.py operators", 3, findings, result.code("operators")
    )


def test_the_file_and_the_table_say_what_is_not_a_plain_success(tmp_path: Path) -> None:
    path = tmp_path / "suites.json"
    result.save("operators", sample(), path)
    result.save("modules", {**sample(), "counts": sample()["counts"]}, path)
    assert list(result.load(path)) == ["modules", "operators"]
    assert result.load(path)["operators"] == json.loads(json.dumps(sample())) | {
        "date": result.load(path)["operators"]["date"]
    }
    text = result.markdown(result.load(path))
    assert "| operators | 3 | 4 | 2 | 1 | 0 | 0 | 2 | 1 | 0 | 0 |" in text
    assert "- differs under any mode: `prod float64`, 2 cases (step 0: gradient)" in text
    assert "- differs: `cov float64`, 1 case (step 1: result)" in text
    assert result.markdown({}) == "*No results yet.*"


def test_a_suite_is_stale_when_what_it_ran_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save("operators", sample(), tmp_path / "suites.json")
    made = result.load(tmp_path / "suites.json")["operators"]
    monkeypatch.setattr(provenance, "code_hash", lambda *args, **named: "0" * 64)
    assert result.why_stale(made) == "the package changed"
    assert provenance.stale_results(tmp_path) == [tmp_path / "suites.json"]
    assert result.why_stale({**made, "driver": ""}) == "the package and benchmarks/borrowed/ changed"


def test_cases_are_judged_anew_and_the_rest_stays(tmp_path: Path) -> None:
    path = tmp_path / "suites.json"
    result.save("operators", sample(), path)
    before = result.load(path)["operators"]
    findings = {
        "cov float64 #0": Finding(Verdict.UNSTEADY, "step 1: result", away=1),
        "prod float64 #1": Finding(Verdict.SAME),
        "unknown #1": Finding(Verdict.DIFFERS),
    }
    result.amend("operators", findings, {**sample(), "command": "again"}, path)
    after = result.load(path)["operators"]
    assert after["counts"]["differs"] == before["counts"]["differs"] - 1
    assert after["counts"]["plain differs"] == before["counts"]["plain differs"] + 1
    assert after["counts"]["same bits"] == before["counts"]["same bits"] + 1
    assert sum(after["counts"].values()) == after["cases"] == before["cases"]
    assert {other["case"] for other in after["others"]} == {"cov float64 #0", "prod float64 #0"}
    assert after["amended"][0]["command"] == "again"
    assert after["amended"][0]["cases"] == ["cov float64 #0", "prod float64 #1"]
    assert (after["code"], after["driver"]) == (before["code"], before["driver"])


def test_plain_runs_that_differ_now_and_then_come_before_any_mode() -> None:
    """What a mode changes by chance in one run is not laid at its door, either."""
    calls = itertools.count()

    def unsteady(x: torch.Tensor) -> torch.Tensor:
        return x * (1.0 if next(calls) % 7 else 2.0)

    assert try_case(Case("now and then", lambda: subject(unsteady, leaf(3)))).verdict is Verdict.UNSTEADY
