"""``torchlms fit``: answers from tape files alone, from recordings, and errors as one line."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

typer_testing = pytest.importorskip("typer.testing")

from tapes import GIB, cpu, gpu  # noqa: E402

from tests import forked  # noqa: E402
from tests.fit.batches import step  # noqa: E402
from torchlms import cli  # noqa: E402
from torchlms.__main__ import main  # noqa: E402
from torchlms.core.curve import smallest_budget  # noqa: E402
from torchlms.core.tape import Kind, Op, Phase, Tape  # noqa: E402
from torchlms.fit.recording import batches_to_record  # noqa: E402

KEYS = {
    "schema", "model", "batch_size", "verdict", "answer", "budget_bytes", "host_budget_bytes",
    "disk_budget_bytes", "smallest_bytes", "narrow", "missing_bytes", "plain", "predicted", "samples_per_s",
    "speed", "extrapolated", "recordings", "machine", "curve", "largest", "notes",
}  # fmt: skip


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two tapes and a machine, as they come from elsewhere."""
    for batch in (2, 4):
        step(batch, device="Card").save(tmp_path / f"tape-{batch}.json")
    machine = replace(gpu(link=8e9), device="Card", host_available_bytes=8 * GIB)
    machine.save(tmp_path / "machine.json")
    arguments = [f"--tape={tmp_path}/tape-{batch}.json" for batch in (2, 4)]
    return ["fit", *arguments, "--batch=2", "--batch=4", f"--machine={tmp_path}/machine.json"]


def invoke(*arguments: str) -> str:
    done = typer_testing.CliRunner().invoke(cli.app, list(arguments))
    assert done.exit_code == 0, done.output or done.exception
    return str(done.stdout)


def answer(*arguments: str) -> dict[str, Any]:
    """Alone on standard output."""
    found: dict[str, Any] = json.loads(invoke(*arguments, "--json", "-"))
    assert set(found) == KEYS
    return found


def test_help_has_an_example() -> None:
    assert "Example: torchlms fit" in " ".join(invoke("fit", "--help").split())


def test_it_fits(files: list[str]) -> None:
    found = answer(*files, "--batch-size=20", "--budget=4GiB")
    assert found["verdict"] == "fits"
    assert found["extrapolated"] is True
    assert found["speed"] == 1
    assert found["plain"]["step_s"] == pytest.approx(sum(op.time_s for op in step(20).ops))
    assert found["samples_per_s"] == pytest.approx(20 / found["plain"]["step_s"])
    assert "synthetic at batch 20 fits in 4.00 GiB: it needs" in invoke(
        *files, "--batch-size=20", "--budget=4GiB"
    )


def test_it_fits_with_moving(files: list[str]) -> None:
    arguments = [*files, "--batch-size=20", "--budget=350MiB"]
    found = answer(*arguments)
    assert found["verdict"] == "moves"
    assert 0 < found["speed"] < 1
    assert found["predicted"]["bytes_out"] > 0
    assert f"with moving, at {found['speed']:.0%} of the speed" in invoke(*arguments)


def test_batches_in_another_order_than_their_tapes(
    files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    swapped = [*files[:3], "--batch=4", "--batch=2", files[-1]]
    assert_refused([*swapped, "--batch-size=8"], "the recording of batch 4 holds fewer bytes than", capsys)


def test_a_recording_without_an_optimizer_step_says_so(files: list[str], tmp_path: Path) -> None:
    """As with gradient accumulation: states are made after what was recorded."""
    tape = step(2, device="Card")
    weight = replace(tape.values[0], id=len(tape.values), kind=Kind.PARAMETER, size_bytes=3 * GIB, saved=-1)
    for name in ("aten.t.default", "aten._foreach_add_.List"):  # a view of it is no update
        last = replace(tape.ops[-1], name=name, writes=(*tape.ops[-1].writes, weight.id))
        changed = replace(tape, ops=(*tape.ops[:-1], last), values=(*tape.values, weight))
        changed.save(tmp_path / "one.json")
        notes = answer("fit", f"--tape={tmp_path}/one.json", "--batch=2", files[-1], "--budget=9GiB")["notes"]
        said = [note for note in notes if "no optimizer step was recorded" in note]
        assert ["Parameters take 3.00 GiB" in note for note in said] == [True] * (name == "aten.t.default")


def test_it_does_not_fit_and_what_would(files: list[str]) -> None:
    arguments = [*files, "--batch-size=20", "--budget=100MiB"]
    found = answer(*arguments)
    assert found["verdict"] == "too_small"
    assert found["predicted"] is None
    assert found["smallest_bytes"] == smallest_budget(step(20))
    said = invoke(*arguments)
    assert f"the smallest budget is 304 MiB ({found['smallest_bytes']} bytes)" in said
    assert f"because of {found['narrow']['name']} (op {found['narrow']['op']}) in layer" in said
    enough = [*files, "--batch-size=20", f"--budget={found['smallest_bytes']}"]
    assert answer(*enough)["verdict"] == "moves"


def test_host_memory_does_not_suffice(files: list[str]) -> None:
    arguments = [*files, "--batch-size=20", "--budget=400MiB", "--host-budget=1MiB"]
    assert answer(*arguments)["verdict"] == "host_too_small"
    assert "host memory and disk (1.00 MiB" in invoke(*arguments)


def test_a_recorded_batch_needs_no_second(files: list[str]) -> None:
    found = answer("fit", files[1], "--batch=2", files[-1], "--budget=1GiB")
    assert (found["batch_size"], found["extrapolated"]) == (2, False)
    assert len(found["recordings"]) == 1
    unknown = answer("fit", files[1], files[-1], "--budget=1GiB")
    assert unknown["batch_size"] is None
    assert unknown["samples_per_s"] == 0


def test_the_curve_and_the_largest_batch(files: list[str], tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    asked = [*files, "--batch-size=20", "--budget=600MiB", "--curve", "--largest"]
    said = invoke(*asked, "--json", str(path))
    found = json.loads(path.read_text())
    assert set(found) == KEYS
    assert [point["speed"] for point in found["curve"]] == sorted(point["speed"] for point in found["curve"])
    largest = found["largest"]
    assert largest["unmoved"]["batch_size"] < largest["fits"]["batch_size"]
    assert [item["share"] for item in largest["keeping"]] == [0.95, 0.8, 0.5]
    sizes = [item["batch"]["batch_size"] for item in largest["keeping"]]
    assert sizes == sorted(sizes)
    lines = said.splitlines()
    assert lines.index(next(line for line in lines if " fits in " in line)) < lines.index(
        next(line for line in lines if line.startswith("budget"))
    )
    assert "#" * 12 in said, "full speed at the largest budget"
    assert "#.." in said
    assert "that fits at all" in said
    table = [line for line in lines if line.endswith((" ms", " us", " s"))]
    assert max(len(line) for line in table) <= 80 - 10, "frames take the rest"


def test_rates_of_another_device_are_pointed_out(files: list[str], tmp_path: Path) -> None:
    replace(gpu(), device="Other").save(tmp_path / "machine.json")
    assert "copies are those of Other" in invoke(
        *files, "--batch-size=4", "--budget=1GiB", "--host-budget=1GiB"
    )


def test_a_tape_of_a_cpu_on_a_card_is_pointed_out(files: list[str], tmp_path: Path) -> None:
    for batch in (2, 4):
        step(batch, device="cpu").save(tmp_path / f"tape-{batch}.json")
    assert "op times are those of cpu" in invoke(*files, "--batch-size=4", "--budget=1GiB")


def test_what_watching_small_ops_takes_is_said_on_a_cpu(files: list[str], tmp_path: Path) -> None:
    for batch in (2, 4):
        tape = step(batch, device="cpu")
        ops = tuple(replace(op, time_s=30e-6) for op in tape.ops)
        replace(tape, ops=ops).save(tmp_path / f"tape-{batch}.json")
    said = "ops take 30 us each on average. To watch one takes LMS some 20 us"
    assert said in " ".join(invoke(*files, "--batch-size=4", "--budget=1GiB").split())


def test_a_step_that_outgrew_its_batch_is_pointed_out(files: list[str], tmp_path: Path) -> None:
    tape = step(4, device="Card")
    slow = replace(tape, ops=tuple(replace(op, time_s=1.6 * op.time_s) for op in tape.ops))
    slow.save(tmp_path / "tape-4.json")
    notes = answer(*files, "--batch-size=16", "--budget=1GiB")["notes"]
    assert any("something else may have run beside it" in note for note in notes)


def test_figures_far_away_carry_a_note(files: list[str]) -> None:
    notes = answer(*files, "--batch-size=17", "--budget=1GiB")["notes"]
    assert any("far from what was recorded" in note for note in notes)
    assert answer(*files, "--batch-size=16", "--budget=1GiB")["notes"] == []


def test_recording_and_keeping_the_tapes(tmp_path: Path) -> None:
    """The whole way, on the CPU; the files then give the same answer without the network."""
    tape = tmp_path / "tape.json"
    said = invoke(
        *("fit", "--model=mnist", "--batch-size=16", "--device=cpu", "--budget=1GiB", f"--save-tape={tape}")
    )
    assert "recording mnist at batch 4 on cpu" in said
    assert "mnist at batch 16 fits in 1.00 GiB" in said
    assert "extrapolated from recordings of batches 4 and 8" in said
    assert [item.name for item in sorted(tmp_path.glob("*.json"))] == ["tape-4.json", "tape-8.json"]
    assert Tape.load(tmp_path / "tape-4.json").model == "mnist"
    cpu().save(tmp_path / "machine.json")
    found = answer(
        "fit", f"--tape={tmp_path}/tape-4.json", "--batch=4", f"--tape={tmp_path}/tape-8.json", "--batch=8",
        "--batch-size=16", "--budget=1GiB", "--disk-budget=1GiB", f"--machine={tmp_path}/machine.json",
    )  # fmt: skip
    assert found["answer"] in said


@pytest.mark.parametrize(
    ("batch", "recorded"),
    [(1, (1,)), (2, (2,)), (3, (2, 3)), (4, (2, 4)), (5, (2, 3)), (8, (2, 4)), (200, (50, 100))],
)
def test_what_is_recorded_by_default(batch: int, recorded: tuple[int, ...]) -> None:
    assert batches_to_record(batch) == recorded


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--budget=much"], "--budget: cannot read 'much'"),
        (["--host-budget=16G"], "--host-budget: unknown unit in '16G'"),
        (["--batch-size=-1"], "--batch-size must not be negative"),
        (["--record=2,4"], "--tape reads recordings; drop --record"),
        (["--tape=third.json"], "--tape was given 3 times"),
        (["--batch=8"], "--tape was given 2 times and --batch 3 times"),
        (["--machine=nowhere.json"], "cannot read machine file nowhere.json"),
        (["--json=no/folder/x.json"], "no/folder/x.json: its folder does not exist"),
        (["--json=/"], "/ is a folder: name a file"),
    ],
)
def test_errors_are_one_line_and_code_2(
    files: list[str], change: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_refused([*files, *change], said, capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tape=nowhere.json"], "cannot read tape file nowhere.json"),
        (["--batch=8"], "--batch says at which batch size a --tape was recorded"),
        (["--model=nope"], "--model nope: unknown"),
        (["--model=mnist", "--device=cpu", "--record=5,5"], "--record 5,5: both batch sizes are the same"),
        (["--model=mnist", "--device=cpu", "--record=x"], "--record x: write one or two"),
        (["--model=mnist", "--device=toaster"], "device toaster: choose cuda, cuda:1 or cpu"),
    ],
)
def test_errors_without_files(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(["fit", *arguments], said, capsys)


def test_tapes_that_do_not_belong_together(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = [argument.replace("--batch=4", "--batch=2") for argument in files]
    assert_refused(same, "both recordings have batch size 2", capsys)
    step(4, layers=5, device="Card").save(tmp_path / "tape-4.json")
    assert_refused([*files, "--batch-size=8"], "the tapes part at op", capsys)


def test_a_tape_of_another_schema(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tape-4.json").write_text(json.dumps({"schema": "torchlms.tape/0"}))
    assert_refused(files, f"{tmp_path}/tape-4.json has schema 'torchlms.tape/0'", capsys)


def test_a_tape_of_no_known_batch(files: list[str]) -> None:
    said = " ".join(invoke("fit", files[1], files[-1], "--budget=1GiB").split())
    assert "from a recording of a batch that --batch may name" in said


def test_what_one_tape_cannot_say(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    one = ["fit", files[1], files[-1]]
    assert_refused(
        [*one, "--batch=2", "--batch-size=9"], "one recording, of batch 2, says nothing of", capsys
    )
    assert_refused([*one, "--batch=2", "--largest"], "--largest needs recordings of two", capsys)
    assert_refused([*one, "--batch-size=9"], "--batch-size needs to know what the tape is of", capsys)


def test_a_card_that_is_not_here(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(files[:-1], "the tape was recorded on Card, which is not here", capsys)


def assert_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("torchlms: " + said), error
    assert error.count("\n") == 1


def test_rules_hold(files: list[str]) -> None:
    free = answer(*files, "--batch-size=20", "--budget=450MiB")
    kept = answer(*files, "--batch-size=20", "--budget=450MiB", "--rule", "keep_ops=*")
    assert (free["verdict"], kept["verdict"]) == ("moves", "too_small")
    assert kept["smallest_bytes"] == kept["plain"]["peak_device_bytes"] > free["smallest_bytes"]
    spare = answer(*files, "--batch-size=20", "--budget=450MiB", "--rule", "headroom_bytes=100MiB")
    assert spare["predicted"]["peak_device_bytes"] <= 350 << 20 < free["predicted"]["peak_device_bytes"]
    waited = answer(*files, "--batch-size=20", "--budget=450MiB", "--rule", "copies=wait", "--curve")
    assert waited["predicted"]["step_s"] > free["predicted"]["step_s"]
    curve = answer(*files, "--batch-size=20", "--budget=450MiB", "--curve")["curve"]
    assert waited["curve"][0]["step_s"] > curve[0]["step_s"]
    assert invoke(*files, "--rule", "keep_modules=nowhere").count("matches nothing in this step") == 1


def test_rules_hold_for_the_largest_batch(files: list[str]) -> None:
    free = answer(*files, "--budget=1GiB", "--largest")["largest"]
    kept = answer(*files, "--budget=1GiB", "--largest", "--rule", "keep_ops=*")["largest"]
    assert kept["fits"] == kept["unmoved"]
    assert kept["fits"]["batch_size"] < free["fits"]["batch_size"]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.more)])
def test_a_script_with_a_loader(tmp_path: Path, workers: int) -> None:
    """From end to end: two batch sizes of an example are recorded, a third is foretold and then recorded."""
    for batch in (4, 8, 12):
        record_script(tmp_path / f"tape-{batch}.json", batch, workers)
    cpu().save(tmp_path / "machine.json")
    two = [f"--tape={tmp_path}/tape-4.json", "--batch=4", f"--tape={tmp_path}/tape-8.json", "--batch=8"]
    given = [f"--machine={tmp_path}/machine.json", "--budget=1GiB", "--host-budget=1GiB"]
    found = answer("fit", *two, "--batch-size=12", *given)
    real = answer("fit", f"--tape={tmp_path}/tape-12.json", "--batch=12", *given)
    assert (found["verdict"], found["extrapolated"]) == ("fits", True)
    foretold_bytes, peak_bytes = (item["plain"]["peak_device_bytes"] for item in (found, real))
    # How many batches the workers had ready is chance, and counted so that the step never has too little.
    most = 1.05 if workers else 1.01
    assert 0.99 * peak_bytes <= foretold_bytes <= most * peak_bytes
    assert 0.99 * real["smallest_bytes"] <= found["smallest_bytes"] <= most * real["smallest_bytes"]
    if not workers:
        assert any("data loading ran other ops" in note for note in found["notes"])


def record_script(tape: Path, batch: int, workers: int) -> None:
    script = Path(__file__).parents[2] / "examples" / "scripts" / "images.py"
    options = [f"--images={8 * batch}", f"--batch-size={batch}", f"--workers={workers}"]
    lms = ["torchlms", "run", "--quiet", "--budget=1GiB", f"--save-tape={tape}"]
    environment = os.environ | {"PYTHONPATH": str(script.parents[2] / "src"), "OMP_NUM_THREADS": "1"}
    done = forked.run(*lms, str(script), *options, cwd=tape.parent, environment=environment)
    assert done.status == 0, done


def test_a_peak_in_data_loading_is_said(files: list[str], tmp_path: Path) -> None:
    for batch in (2, 4):
        tape = step(batch, device="Card")
        loading = Op("aten.randn", "", Phase.BETWEEN, 1e-4, (), (), scratch_bytes=batch * GIB)
        replace(tape, ops=(*tape.ops, *[loading] * batch)).save(tmp_path / f"tape-{batch}.json")
    found = answer(*files, "--batch-size=8", "--budget=7GiB")
    assert (found["verdict"], found["narrow"]["name"]) == ("too_small", "data loading")
    assert found["smallest_bytes"] > 8 * GIB
    assert any("in use while data is loaded" in note for note in found["notes"])


def test_where_the_search_for_the_largest_ends_is_said(files: list[str], tmp_path: Path) -> None:
    small = step(2, device="Card")
    grown = replace(small.values[0], size_bytes=small.values[0].size_bytes + 1)  # hardly, with the batch
    small.save(tmp_path / "tape-2.json")
    replace(small, values=(grown, *small.values[1:])).save(tmp_path / "tape-4.json")
    asked = [*files, "--budget=4GiB", "--largest"]
    found = answer(*asked)
    assert found["largest"]["fits"]["at_least"] is True
    assert "the largest batch is at least 1048576: no larger one was tried" in found["notes"]
    said = " ".join(invoke(*asked).split())
    assert said.count("at least 1048576") == 6, "five rows and the note"
    assert "at least 1048576: no larger one was tried" in said
    step(4, device="Card").save(tmp_path / "tape-4.json")
    bounded = answer(*asked)
    assert bounded["largest"]["fits"]["at_least"] is False
    assert "was tried" not in " ".join(bounded["notes"])
