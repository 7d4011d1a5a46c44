"""The command line: verbs, help, options that arrive, errors as one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

typer = pytest.importorskip("typer")
typer_testing = pytest.importorskip("typer.testing")

from torchlms import cli  # noqa: E402
from torchlms.__main__ import main  # noqa: E402
from torchlms.bench.arguments import to_arguments  # noqa: E402
from torchlms.bench.command import BenchCommand, NotIdentical  # noqa: E402
from torchlms.bench.options import BenchOptions, Way  # noqa: E402
from torchlms.bench.provenance import code_hash, command_line, stale_results  # noqa: E402
from torchlms.core.machine import CopyTime, Machine  # noqa: E402
from torchlms.errors import LMSError  # noqa: E402

VERBS = {
    command.callback.__name__: (command.callback.__doc__ or "").strip()
    for command in cli.app.registered_commands
    if command.callback is not None
}
TINY = ["--model", "mnist", "--batch-size", "2", "--num-batches", "1", "--device", "cpu", "--no-lms"]


def invoke(*arguments: str) -> Any:
    return typer_testing.CliRunner().invoke(cli.app, list(arguments))


def captured_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> BenchCommand:
    seen: list[BenchCommand] = []
    monkeypatch.setattr("torchlms.bench.command.bench", lambda command, *rest: seen.append(command))
    monkeypatch.setattr("torchlms.bench.command.pace", lambda options: (1, "images"))
    done = invoke("bench", *arguments)
    assert done.exit_code == 0, done.output
    return seen[0]


def test_bench_end_to_end(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    done = invoke("bench", *TINY, "--json", str(path))
    assert done.exit_code == 0, done.output
    assert "total images/sec:" in done.output
    assert "\x1b" not in done.output
    assert json.loads(path.read_text())["model"] == "mnist"


def test_no_arguments_print_help() -> None:
    done = invoke()
    assert done.exit_code == 0
    said = " ".join(done.output.split())
    assert "..." not in said.partition("Commands:")[2], "nothing is cut off"
    assert all(f" {verb} {text}" in said for verb, text in VERBS.items())
    assert "To begin with: torchlms demo" in said


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_has_an_example_that_can_be_read(verb: str) -> None:
    done = invoke(verb, "--help")
    assert done.exit_code == 0
    example = " ".join(done.output.split()).partition("Example: torchlms ")[2].split()
    assert example[0] == verb
    command: Any = typer.main.get_command(cli.app)
    with command.make_context("torchlms", list(example)) as context:
        left = [*getattr(context, "_protected_args", []), *context.args]
        name, found, rest = command.resolve_command(context, left)
        found.make_context(name, rest, parent=context)


@pytest.mark.parametrize(
    ("shell", "mark"),
    [("bash", "complete -o"), pytest.param("zsh", "#compdef torchlms", marks=pytest.mark.more)],
)
def test_completion(shell: str, mark: str, tmp_path: Path) -> None:
    """Shown, and installed into an empty home; then the shell's question gets the verbs."""
    environment = os.environ | {
        "HOME": str(tmp_path),
        "SHELL": f"/bin/{shell}",
        "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1",
    }

    def asked(*arguments: str, **more: str) -> str:
        command = [sys.executable, "-m", "torchlms", *arguments]
        done = subprocess.run(
            command, env=environment | more, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert mark in asked("--show-completion", shell)
    asked("--install-completion", shell)
    written = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert any("torchlms" in text for text in written)
    words = asked(_TORCHLMS_COMPLETE=f"complete_{shell}", COMP_WORDS="torchlms do", COMP_CWORD="1",
                  _TYPER_COMPLETE_ARGS="torchlms do")  # fmt: skip
    assert "doctor" in words
    assert "bench" not in words


@pytest.mark.parametrize(
    "arguments",
    [
        ["version"],
        ["bench", *TINY],
        ["probe", "--device=cpu"],
        pytest.param(["bench", *TINY, "--compare=none"], marks=pytest.mark.more),
    ],
)
def test_json_alone_on_standard_output(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(device="cpu", device_bytes=2**34, torch="2.13")
    monkeypatch.setattr("torchlms.api.measured_machine", lambda *args, **more: machine)
    done = invoke(*arguments, "--json", "-")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)
    assert "torch" in done.stderr.lower() or "figure" in done.stderr, "the text is there all the same"
    assert not Path("-").exists()


@pytest.mark.parametrize("asked", ["version", "--version"])
def test_version(asked: str) -> None:
    assert "torch " in invoke(asked).output


def test_list_names_the_networks() -> None:
    told = json.loads(invoke("bench", "--list", "--json=-").stdout)
    assert "mnist" in [network["name"] for network in told]
    output = invoke("bench", "--list").output
    assert "resnet50" in output
    assert "cifar10_full" in output


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = BenchOptions(
        model="llama", batch_size=3, image_size=5, num_batches=7, warmup=2, display_every=4, device="cpu",
        dtype="bfloat16", optimizer="adam", learning_rate=0.5, way=Way.LMS, budget="1GiB", host_budget="2GiB",
        disk_dir="spill", disk_budget="3GB", plan="p.json", cap="4GiB", seed=9, cudnn_benchmark=True,
        deterministic=True, hidden=64, layers=2, heads=4, kv_heads=2, sequence=8, vocab=99,
        width=32, norm="batch", recompute=False, verify=True, verify_every=3, snapshot=True,
        rule=("keep_ops=aten.relu*,aten.gelu*", "min_bytes=4MiB"),
    )  # fmt: skip
    defaults = BenchOptions()
    same = [f for f in BenchOptions.__slots__ if f != "way" and getattr(wanted, f) == getattr(defaults, f)]
    assert not same, "this test must set every option"
    command = captured_command(monkeypatch, *to_arguments(wanted))
    assert command.options == wanted
    for way in Way:
        changed = replace(defaults, way=way)
        assert captured_command(monkeypatch, *to_arguments(changed)).options == changed


LMS_TINY = ["bench", "--model=mnist", "--batch-size=16", "--device=cpu", "--num-batches=3", "--warmup=3"]


def test_options_of_lms_take_effect(tmp_path: Path) -> None:
    """Rules move other values; what comes back is checked where that is asked for."""

    def figures(*options: str) -> dict[str, Any]:
        where = [f"--disk-dir={tmp_path}", f"--save-run={tmp_path}/run.json", "--budget=1GiB"]
        done = invoke(*LMS_TINY, *where, *options)
        assert done.exit_code == 0, done.output
        found: dict[str, Any] = json.loads((tmp_path / "run.json").read_text())["stats"]
        return found

    assert figures()["bytes_out_per_step"] == 0
    moved = figures("--rule=move_ops=aten.relu*", "--snapshot")
    assert moved["bytes_out_per_step"] > 0
    assert moved["verified_values"] == 0
    assert figures("--rule=move_ops=aten.relu*", "--verify")["verified_values"] > 0
    assert figures("--rule=move_ops=aten.relu*", "--verify-every=2")["verified_values"] > 0


def test_report_as_json_alone(tmp_path: Path) -> None:
    """It says what the page says, and no page is drawn that nobody asked for."""
    path = tmp_path / "run.json"
    done = invoke(*LMS_TINY, "--budget=1GiB", f"--disk-dir={tmp_path}", f"--save-run={path}")
    assert done.exit_code == 0, done.output
    found = json.loads(invoke("report", str(path), "--json", "-", "--no-curve").stdout)
    assert found["schema"] == "torchlms.report/1"
    assert "nothing has to leave" in found["headline"]
    assert found["stats"]["steps"] == 6
    assert found["findings"]
    assert not path.with_suffix(".html").exists()


@pytest.mark.parametrize("option", ["--no-recompute", "--verify", "--verify-every=2", "--snapshot"])
def test_options_of_lms_need_lms(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *TINY, option]) == 2
    assert f"{option.partition('=')[0]}: only LMS can do that" in capsys.readouterr().err


def test_options_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    command = captured_command(
        monkeypatch, "--compare", "none,checkpoint", "--compare-timeout", "9", "--cap-rivals", "--identity",
        "--report", "--csv", "b.csv",
    )  # fmt: skip
    assert command.compare == (Way.NONE, Way.CHECKPOINT)
    assert command.compare_timeout_s == 9
    assert command.cap_rivals
    assert command.identity
    assert command.report
    assert command.csv_path == Path("b.csv")


def test_no_lms_is_the_way_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert captured_command(monkeypatch, "--no-lms").options.way is Way.NONE
    assert captured_command(monkeypatch).options.way is Way.LMS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "--model", "nope", "--no-lms"], "--model nope: unknown. Known: alexnet"),
        (["bench", "--way", "magic"], "--way magic: choose from lms, none"),
        (["bench", "--no-lms", "--way", "checkpoint"], "--no-lms contradicts"),
        (["bench", "--compare", "prayer"], "--compare prayer: choose from"),
        (["bench", "--budget", "much"], "--budget: "),
    ],
)
def test_errors_are_one_line_and_code_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchlms: " + said)
    assert error.count("\n") == 1


def test_a_budget_too_small_names_a_command_that_answers(capsys: pytest.CaptureFixture[str]) -> None:
    network = ["--model", "mnist", "--batch-size", "64", "--device", "cpu", "--budget", "13MiB"]
    assert main(["bench", *network, "--num-batches", "1", "--no-live"]) == 2
    error = capsys.readouterr().err
    assert "torchlms: aten." in error
    assert f"`torchlms fit {' '.join(network)}`" in error
    assert main(["fit", *network]) == 0
    assert "smallest budget" in capsys.readouterr().out


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(LMSError):
        main(["--debug", "bench", "--model", "nope", "--no-lms"])


def test_unknown_verb_is_a_usage_error() -> None:
    assert main(["train"]) == 2


def test_differing_losses_end_with_code_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def differ(*args: object) -> None:
        raise NotIdentical("losses: differ from step 3 of 9")

    monkeypatch.setattr("torchlms.bench.command.bench", differ)
    assert main(["bench", "--identity"]) == 1


def test_typer_missing_is_one_friendly_line() -> None:
    code = "import sys; sys.modules['typer'] = None; from torchlms.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "pip install '.[cli]' in a clone" in done.stderr
    assert done.stderr.count("\n") == 1


def test_probe_prints_every_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine(
        device="cuda", device_bytes=2**34, torch="2.13", pin_bytes_per_s=1.5e9,
        link=(CopyTime(2**20, 1e-3, 2e-3),),
    )  # fmt: skip
    seen: list[Any] = []

    def measured(device: Any, disk_dir: Any, *, refresh: bool, progress: Any) -> Machine:
        seen.extend([device.type, disk_dir, refresh])
        progress("measuring")
        return machine

    monkeypatch.setattr("torchlms.api.measured_machine", measured)
    path = tmp_path / "machine.json"
    done = invoke("probe", "--device", "cpu", "--disk-dir", "spill", "--refresh", "--json", str(path))
    assert done.exit_code == 0, done.output
    assert seen == ["cpu", "spill", True]
    assert "16.0 GiB" in done.output
    assert "1.50 GB/s" in done.output
    assert "1.0 GB/s out, 0.5 GB/s in" in done.output
    assert "unlimited" in done.output
    assert Machine.load(path) == machine


def test_stale_results_are_listed(tmp_path: Path) -> None:
    fresh, old, other = tmp_path / "fresh.json", tmp_path / "old.json", tmp_path / "other.json"
    fresh.write_text(json.dumps({"schema": "torchlms.bench/1", "code": code_hash()}))
    old.write_text(json.dumps({"schema": "torchlms.bench/1", "code": "0" * 64}))
    other.write_text("[1]")
    assert stale_results(tmp_path) == [old]
    done = invoke("bench", "--stale", str(tmp_path))
    assert done.exit_code == 1
    assert done.output.split() == [str(old)]


def test_code_hash_sees_sources_but_not_presentation(tmp_path: Path) -> None:
    (tmp_path / "core").mkdir()
    (tmp_path / "report").mkdir()
    (tmp_path / "core" / "plan.py").write_text("a = 1\n")
    before = code_hash(tmp_path)
    (tmp_path / "cli").mkdir()
    (tmp_path / "cli" / "run.py").write_text("b = 1\n")
    (tmp_path / "report" / "html.py").write_text("c = 1\n")
    assert code_hash(tmp_path) == before
    (tmp_path / "core" / "plan.py").write_text("a = 2\n")
    assert code_hash(tmp_path) != before


def test_command_line_is_as_typed() -> None:
    assert command_line(["bench", "--model", "a b"]) == "torchlms bench --model 'a b'"
