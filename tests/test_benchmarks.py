"""benchmarks/: the rows, the files, the tables, and one row from end to end on this CPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import convolutions  # noqa: E402
import ladder  # noqa: E402
import large  # noqa: E402
import result_file  # noqa: E402
import rows  # noqa: E402
import run  # noqa: E402
import tables  # noqa: E402
import worker  # noqa: E402

from torchlms.bench import provenance  # noqa: E402

GIB = 2**30
FACTS = {
    "device": "cuda",
    "device_name": "Some GPU",
    "torch": "2.11.0",
    "python": "3.12.3",
    "host": {"cpus": 16, "ram_bytes": 128 * GIB, "cpu": "Some CPU", "threads": 16},
    "cuda": "13.0",
    "cudnn": 91900,
    "driver": "580.1",
}
FLAGS = {"cudnn_benchmark": False, "cudnn_deterministic": True}
MACHINE = {"link": [{"size_bytes": 1 << 30, "out_s": 0.02, "in_s": 0.02}]}
LOSSES = [float(n).hex() for n in range(15)]


def entry(way: str, step_s: float, **more: Any) -> dict[str, Any]:
    return {
        "way": way,
        "lms": way.startswith("lms"),
        "steps": 10,
        "warmup_s": [1.0] * 5,
        "step_s": {"median": step_s, "min": step_s, "max": step_s * 1.1},
        "items_per_s": 200 / step_s,
        "unit": "images",
        "losses": LOSSES,
        "peak_device_bytes": 15 * GIB,
        "peak_reserved_bytes": 16 * GIB,
        "whole_run_device_bytes": 15 * GIB,
        "whole_run_reserved_bytes": 17 * GIB if way.startswith("none") else 16 * GIB,
        **more,
    }


def lms_entry(**more: Any) -> dict[str, Any]:
    return entry(
        "lms",
        0.1,
        state="guard",
        budget_bytes=16 * GIB,
        best_s=0.095,
        record_s=2.0,
        plan_s=0.5,
        host_pinned_bytes=2 * GIB,
        bytes_out_per_step=2 * GIB,
        bytes_in_per_step=2 * GIB,
        starved_convolutions=0,
        replans=1,
        while_timed={"reclaims": 0},
        predicted={
            "peak_device_bytes": 15 * GIB,
            "peak_reserved_bytes": 16 * GIB,
            "step_s": 0.098,
            "arena_bytes": 2 * GIB,
        },
        machine=MACHINE,
        **more,
    )


def made(name: str, *entries: dict[str, Any]) -> dict[str, Any]:
    row = rows.ROWS[name]
    code = result_file.Code.now(row)
    result: dict[str, Any] | None = None
    for one in entries:
        result = result_file.merged(row, result, FACTS, FLAGS, code.stamp(one))
    assert result is not None
    return json.loads(result_file.as_text(result))


def sample() -> dict[str, Any]:
    return made(
        "resnet50-b200",
        entry("none", 0.098),
        lms_entry(),
        entry("none_again", 0.0981, losses=LOSSES[:10]),
        entry("save_on_cpu", 1.0, peak_host_bytes=40 * GIB),
        {"way": "none_capped", "lms": False, "error": "OutOfMemoryError: CUDA out of memory. Tried | to"},
    )


def conv(forward_s: float, bits: str) -> dict[str, Any]:
    return {
        "convolution": "1x1 by 3x3",
        "forward_s": forward_s,
        "backward_s": 1.0,
        "bits": {"output": bits},
        "not_repeatable": ["weight_gradient"],
    }


def test_rows_are_well_formed() -> None:
    for name, row in rows.ROWS.items():
        assert name == row.name
        assert re.fullmatch(r"[a-z0-9-]+", name)
        assert row.targets
        assert row.proves
        assert row.warmup + row.steps >= rows.IDENTITY_STEPS
        json.dumps(row.definition())
        assert len(worker.all_jobs(row)) == len(worker.all_jobs(rows.tiny(row)))
        assert (row.options.budget is None) is (0 < row.share < 1)
        assert row.cuda or row.share
        module, _, factory = row.options.model.partition(":")
        assert module != "large" or callable(getattr(large, factory))
    assert rows.ROWS["resnet50-b200"].definition() != rows.ROWS["resnet50-b225"].definition()


def test_rows_are_found_by_their_beginnings() -> None:
    assert [row.name for row in rows.find(["conv-health"])] == ["conv-health"]
    assert len(rows.find(["resnet50"])) == 6
    assert [row.name for row in rows.find(["cpu", "cpu-transformer"])] == [
        "cpu-resnet50-b32-128",
        "cpu-transformer",
    ]
    assert len(rows.find(["all"])) == len(rows.ROWS)
    with pytest.raises(SystemExit, match="no row begins with 'vgg'"):
        rows.find(["vgg"])


def test_figures_and_targets_follow_from_the_entries() -> None:
    figures = sample()["figures"]
    assert figures["of_plain"] == pytest.approx(0.98)
    assert figures["of_best"] == pytest.approx(0.95)
    assert figures["over_save_on_cpu"] == pytest.approx(10)
    assert figures["identity"] == {"with": "none", "steps": 15, "first_difference": None}
    assert figures["plain_repeats_its_bits"]
    assert figures["host_over_out"] == 1
    assert figures["step_error"] == pytest.approx(0.1 / 0.098 - 1)
    assert all(check["met"] for check in sample()["targets"])
    assert tables.targets_lines({"resnet50-b200": sample()}) == ["all targets met"]


def test_missed_targets_are_said() -> None:
    slow = made("resnet50-b200", entry("none", 0.08), lms_entry(losses=[*LOSSES[:12], "0x0p0"]))
    lines = tables.targets_lines({"resnet50-b200": slow})
    assert "resnet50-b200: of_plain 0.800, target >= 0.97" in lines
    assert "resnet50-b200: same_bits no, target >= 1" in lines
    assert "**differ** from step 13 of 13" in tables.long_tables({"resnet50-b200": slow})
    assert "**missed**" in tables.long_tables({"resnet50-b200": slow})
    assert "not the same bits" in tables.short_table({tables.FRONT[0]: slow})
    over = made("resnet50-b200", lms_entry(whole_run_reserved_bytes=17 * GIB))
    assert over["figures"]["within_budget"] is False
    few = made("resnet50-b200", entry("none", 0.1, losses=LOSSES[:9]), lms_entry())
    assert few["figures"]["same_bits"] is False


def test_a_new_entry_replaces_the_old_one_and_keeps_the_others() -> None:
    row = rows.ROWS["resnet50-b200"]
    code = result_file.Code.now(row)
    again = result_file.merged(row, sample(), FACTS, FLAGS, code.stamp(entry("save_on_cpu", 2.0)))
    assert [one["way"] for one in again["entries"]] == [
        "none", "lms", "none_again", "none_capped", "save_on_cpu",
    ]  # fmt: skip
    assert again["figures"]["over_save_on_cpu"] == pytest.approx(20)
    assert again["machine"] == MACHINE
    elsewhere = {**FACTS, "device_name": "Another GPU"}
    moved = result_file.merged(row, sample(), elsewhere, FLAGS, code.stamp(entry("none", 1.0)))
    assert [one["way"] for one in moved["entries"]] == ["none"]
    assert moved["machine"] is None, "it was the other GPU's"
    longer = result_file.merged(
        replace(row, steps=11), sample(), FACTS, FLAGS, code.stamp(entry("none", 1.0))
    )
    assert [one["way"] for one in longer["entries"]] == ["none"]
    assert longer["machine"] == MACHINE


def test_tables_show_rivals_failures_and_predictions() -> None:
    results = {"resnet50-b200": sample()}
    short, long = tables.short_table({tables.FRONT[0]: sample()}), tables.long_tables(results)
    assert "**Some GPU, capped at 16 GiB, torch 2.11.0**" in short
    assert "| ResNet-50, batch 200, moving alone (plain needs 17.0 GiB) | 2041 | 2000 |" in short
    assert "| 2041 | 2000 | 0.980 | 0.950 | 200 | - |" in short
    assert "OutOfMemoryError: CUDA out of memory. Tried \\| to" in long
    assert "0.10 → 100.0" not in long
    assert "98.0 → 100.0 (+2.0%)" in long
    assert "same over 15" in long
    assert "(results/resnet50-b200.json)" in long
    assert "link 54 GB/s out and 54 GB/s in" in tables.hardware(results)
    widths = {line.count("|") for line in short.splitlines() if line.startswith("|")}
    assert widths == {9}
    assert any("1000.0 ms" in line for line in tables.text_table(results))
    assert tables.short_table({}) == tables.long_tables({}) == "*No results yet.*"


def test_rows_under_a_joint_plan_have_rivals_and_must_be_ahead_of_each() -> None:
    for row in rows.ROWS.values():
        if row.name.startswith("joint-"):
            assert {rows.CHECKPOINT, rows.CHECKPOINT_OFFLOAD} <= set(row.rivals)
            assert rows.Target("over_rivals", at_least=1) in row.targets
        bare = replace(row, rivals=(), targets=(), proves="", label="")
        assert bare.definition() == row.definition()


def against(*rivals: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], str]:
    """What comes of a joint row with these rivals: its figures, the target's check and line of the table."""
    capped = [{"cap_bytes": 16 * GIB, **rival} for rival in rivals]
    result = made("joint-resnet50-b400", entry("none", 0.09), lms_entry(), *capped)
    check = next(one for one in result["targets"] if one["figure"] == "over_rivals")
    table = tables.long_tables({"joint-resnet50-b400": result})
    return result["figures"], check, next(line for line in table.splitlines() if "| over rivals |" in line)


def test_lms_stands_beside_the_fastest_rival_that_fits() -> None:
    fast = entry("save_on_cpu", 0.05, peak_reserved_bytes=16 * GIB + 1)
    slow, slower = entry("checkpoint", 0.12), entry("checkpoint_offload", 0.2)
    figures, check, line = against(fast, slow, slower)
    assert figures["over_rivals"] == pytest.approx(1.2)
    assert figures["save_on_cpu_fits"] is False
    assert check["met"] is True
    assert "| yes | 1.200 | met |" in line
    figures, check, line = against(entry("save_on_cpu", 0.05), slow, slower)
    assert figures["over_rivals"] == pytest.approx(0.5)
    assert check["met"] is False
    failed = {"way": "checkpoint", "lms": False, "error": "OutOfMemoryError: no"}
    figures, check, line = against(fast, failed, slower)
    assert figures["over_rivals"] == pytest.approx(2)
    figures, check, line = against(fast, failed, {**failed, "way": "checkpoint_offload"})
    assert "over_rivals" not in figures
    assert check["met"] is True
    assert "| no rival that was tried runs within the budget | met |" in line


def test_targets_of_a_row_in_which_lms_failed_are_missed() -> None:
    failed = {"way": "lms", "lms": True, "error": "BudgetTooSmall: no"}
    result = made("resnet50-b200", entry("none", 0.098), failed)
    assert {check["met"] for check in result["targets"]} == {False}
    assert "| LMS ended in an error | **missed** |" in tables.long_tables({"resnet50-b200": result})
    cut_short = {**failed, "error": "no result in 60 s"}
    result = made("resnet50-b200", entry("none", 0.098), cut_short)
    assert {check["met"] for check in result["targets"]} == {None}


def test_a_rival_that_was_not_measured_may_be_faster() -> None:
    figures, check, line = against(entry("checkpoint", 0.12), entry("save_on_cpu", 0.3))
    assert figures["over_rivals"] == pytest.approx(1.2)
    assert check["met"] is None
    assert "| 1.200, checkpoint_offload not measured |  |" in line
    assert against(entry("checkpoint", 0.09))[1]["met"] is False
    assert against(entry("checkpoint", 0.12, cap_bytes=None))[1]["value"] is None, "without the cap"
    cut_short = {"way": "save_on_cpu", "lms": False, "error": "no result in 22 s"}
    offload = entry("checkpoint_offload", 0.2)
    figures, check, line = against(entry("checkpoint", 0.12), offload, cut_short)
    assert check["met"] is None, "it was only given too little time"
    assert "| 1.200, save_on_cpu not measured |  |" in line
    figures, check, line = against()
    assert (check["value"], check["met"]) == (None, None)
    assert "| not measured |  |" in line


def test_where_nothing_moves_nothing_is_compared() -> None:
    for pinned_bytes, found in (
        (0, "nothing moves | met"),
        (3 * GIB, "nothing moves, 3.0 GiB pinned | **missed**"),
    ):
        still = {**lms_entry(), "bytes_out_per_step": 0, "host_pinned_bytes": pinned_bytes}
        result = made("joint-resnet50-b400", entry("none", 0.09), still)
        assert "host_over_out" not in result["figures"]
        assert f"| host over out | <= 1.1 | {found} |" in tables.long_tables({"row": result})


def test_convolutions_are_compared_with_those_before() -> None:
    before = {"way": "before", "lms": False, "batches": {"200": [conv(1.0, "a")], "400": [conv(2.0, "b")]}}
    starved = {"way": "starved", "lms": False, **conv(3.0, "x")}
    good = [
        {**lms_entry(), "way": f"lms-{batch}", "convolutions": [conv(second, bits)]}
        for batch, second, bits in ((200, 1.02, "a"), (400, 2.0, "b"))
    ]
    result = made("conv-health", before, *good, starved)
    figures = result["figures"]
    assert figures["max_slowdown"] == pytest.approx(1.02)
    assert figures["same_bits"] is True
    assert figures["starved_convolutions"] == 0
    assert figures["starved_on_purpose"]["forward_slowdown"] == pytest.approx(3)
    assert figures["starved_on_purpose"]["bits_differ"] == ["output"]
    note = tables.long_tables({"conv-health": result})
    assert "batch 200 and 400, after 20 planned steps" in note
    assert "3.0 times as long and gives other bits" in note
    bad = made("conv-health", before, {**good[0], "convolutions": [conv(4.0, "x")]})
    assert bad["figures"]["same_bits"] is False
    assert "resnet50" not in "".join(tables.targets_lines({"conv-health": bad}))
    assert "conv-health: max_slowdown 4.000, target <= 1.15" in tables.targets_lines({"conv-health": bad})


def test_convolutions_of_a_network_are_seen_without_running_it() -> None:
    options = rows.ROWS["conv-health"].options
    found = convolutions.convolutions_of(replace(options, batch_size=200))
    assert found[0].inputs == (200, 3, 224, 224)
    assert not found[0].input_gradient
    assert all(one.input_gradient for one in found[1:])
    assert len(found) == len(set(map(str, found))) > 15


def test_checksums_see_one_bit() -> None:
    tensor = torch.randn(3000)
    before = convolutions.checksum(tensor)
    assert convolutions.checksum(tensor.clone()) == before
    tensor.view(torch.int32)[2999] ^= 1
    assert convolutions.checksum(tensor) != before


def test_text_stays_between_its_marks() -> None:
    text = "a\n<!-- figures -->\nold\nlines\n<!-- /figures -->\nb\n"
    after = tables.between_marks(text, "figures", "new \\1 | table\n")
    assert after == "a\n<!-- figures -->\nnew \\1 | table\n<!-- /figures -->\nb\n"
    assert tables.between_marks(after, "figures", "new \\1 | table") == after
    with pytest.raises(ValueError, match="hardware"):
        tables.between_marks(text, "hardware", "x")


def test_results_of_every_kind_are_told_to_be_stale(tmp_path: Path) -> None:
    kept = sorted(result_file.FOLDER.glob("*.json"))
    assert kept
    for path in kept:
        made = re.sub(r'"code": "[0-9a-f]+"', f'"code": "{"0" * 64}"', path.read_text())
        (tmp_path / path.name).write_text(made)
    assert [path.name for path in provenance.stale_results(tmp_path)] == [path.name for path in kept]


def test_stale_results_say_what_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result_file.save(sample(), tmp_path / "resnet50-b200.json")
    stale = ["--stale", "--out", str(tmp_path)]
    assert run.main(stale) == 0
    assert provenance.stale_results(tmp_path) == []
    code_files = provenance.code_files

    def changed_files(*given: Any, **named: Any) -> dict[str, str]:
        files = code_files(*given, **named)
        return {name: "0" * 64 if name == "eager/engine.py" else text for name, text in files.items()}

    monkeypatch.setattr(provenance, "code_files", changed_files)
    assert run.main(stale) == 1
    assert capsys.readouterr().out == "resnet50-b200: lms: eager/engine.py changed\n"
    monkeypatch.undo()
    changed = sample()
    changed["definition"]["steps"] = 11
    result_file.save(changed, tmp_path / "resnet50-b200.json")
    result_file.save(sample(), tmp_path / "no-such-row.json")
    assert run.main(stale) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "resnet50-b200: the row's definition has changed",
        "no-such-row: no such row any more",
    ]


def test_what_has_no_rows_may_be_stale_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, schema, code in (
        ("faults-cpu", "faults/1", provenance.code_hash()),
        ("planning", "planning/1", "0" * 64),
        ("sanitizer", "sanitizer/1", "0" * 64),
        ("soak-cuda", "soak/2", "0" * 64),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"schema": f"torchlms.{schema}", "code": code}))
    assert run.main(["--stale", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "planning: the package has changed",
        "sanitizer: the package has changed",
        "soak-cuda: the package has changed",
    ]


def test_code_of_presentation_and_of_rivals() -> None:
    files = provenance.code_files()
    assert {"api.py", "director.py", "statistics.py", "core/planner.py", "bench/workload.py"} <= set(files)
    assert not {"report.py", "cli.py", "errors.py", "__main__.py", "bench/table.py"} & set(files)
    assert all(name.startswith("bench/") for name in provenance.code_files(parts=provenance.RIVAL_PARTS))


def test_entries_arrive_one_by_one_and_missing_ones_say_why(tmp_path: Path) -> None:
    row = rows.ROWS["resnet50-b200"]
    sitting = run.Sitting(tmp_path / "out", 60.0, 1e9, bundle=tmp_path / "all.json")
    path = tmp_path / "found"
    intake = run.Intake(worker.main_jobs(row)[0], path, sitting)
    with path.open("w") as file:
        file.write(json.dumps({"facts": FACTS}) + "\n" + json.dumps({"flags": FLAGS}) + "\n")
        file.write(json.dumps({"entry": entry("none", 0.1)}) + "\n" + '{"entry": {"way": "lm')
    intake.look()
    result = result_file.load(tmp_path / "out" / "resnet50-b200.json")
    assert result is not None
    assert [one["way"] for one in result["entries"]] == ["none"]
    intake.close(f"no result in 60 s, see {ROOT}/src")
    result = json.loads((tmp_path / "all.json").read_text())["resnet50-b200"]
    assert [one.get("error") for one in result["entries"]] == [None, *["no result in 60 s, see src"] * 2]
    assert run.main(["--unpack", str(tmp_path / "all.json"), "--out", str(tmp_path / "home")]) == 0
    assert result_file.load(tmp_path / "home" / "resnet50-b200.json") == result


def test_a_process_that_takes_too_long_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert run._wait(process, 0.1, lambda: None) == "no result in 0 s"
    assert process.returncode == -9


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["cpu-transformer"], marks=pytest.mark.slow),
        pytest.param(["conv-health", "--only", "before,lms-4"], marks=pytest.mark.slow),
        pytest.param(["ladder-resnet50-b230"], marks=pytest.mark.slow),
    ],
)
def test_a_row_from_end_to_end(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert run.main([*arguments, "--tiny", "--out", str(tmp_path)]) == 0
    result = result_file.load(tmp_path / f"{arguments[0]}.json")
    assert result is not None
    assert [one.get("error") for one in result["entries"]] == [None] * len(result["entries"])
    if arguments[0] == "cpu-transformer":
        assert result["figures"]["same_bits"] is True
        assert result["figures"]["within_budget"] is True
        assert result["figures"]["identity"]["steps"] >= rows.IDENTITY_STEPS
        assert "cpu-transformer  lms" in capsys.readouterr().out
    elif arguments[0].startswith("ladder"):
        assert result["figures"]["finished"] is True
        assert result["figures"]["same_bits"] is True
    else:
        assert result["figures"]["same_bits"] is True
        assert result["figures"]["batches"]["lms-4"]["bits_compared"] > 5


def test_the_tables_are_those_of_the_results() -> None:
    """``make figures`` was run after the last change of a result."""
    for path, texts in tables.tables().items():
        text = path.read_text()
        for mark, content in texts.items():
            assert tables.between_marks(text, mark, content) == text, f"{path.name}: run `make figures`"


def ladder_sample() -> dict[str, Any]:
    ours = {"each_step_s": [0.4, 0.2, 0.101, 0.1, 0.1, 0.1]}
    return made(
        "ladder-resnet50-b230",
        entry("none", 0.08),
        lms_entry(),
        *({**lms_entry(**ours), "way": way} for way in ladder.WAYS[2:]),
    )


def test_a_ladder_says_how_soon_it_is_back_at_speed() -> None:
    result = ladder_sample()
    figures = result["figures"]
    assert figures["finished"] is figures["same_bits"] is figures["within_budget"] is True
    assert figures["misplanned_steps_to_speed"] == figures["shrunk_steps_to_settle"] == 2
    assert figures["shrunk_of_planned"] == pytest.approx(1, rel=0.02)
    assert ladder.steps_to_speed([0.1, 0.3, 0.1, 0.1, 0.1], 0.1) == 2
    assert ladder.steps_to_speed([0.2] * 5, 0.1) == 5
    results = {"ladder-resnet50-b230": result}
    assert tables.targets_lines(results) == ["all targets met"]
    assert "Back at planned speed 2 steps after" in tables.long_tables(results)
    assert "the same bits as plain in all of them" in tables.long_tables(results)


def test_a_ladder_with_a_way_that_fails_has_not_finished() -> None:
    failed = {"way": ladder.SHRUNK, "lms": True, "error": "OutOfMemoryError: no"}
    result = made("ladder-resnet50-b230", entry("none", 0.08), lms_entry(), failed)
    assert result["figures"]["finished"] is False
    assert ladder.note(result) == ""
