"""Figures as JSON: in a file, or alone on standard output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchlms.errors import BadOption
from torchlms.outlet import STDOUT, outlet


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no such device")
def test_a_full_disk_is_named() -> None:
    said = "/dev/full could not be written: No space left"
    with outlet(Path("/dev/full")) as put, pytest.raises(BadOption, match=said):
        put({"a": 1})


def test_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with outlet(tmp_path / "a.json") as put:
        print("said")
        put({"figure": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"figure": 1}
    assert capsys.readouterr() == ("said\n", "")


def test_standard_output_has_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with outlet(STDOUT) as put:
        print("said")
        put([2])
    print("after")
    out, error = capsys.readouterr()
    assert (json.loads(out.removesuffix("after\n")), error) == ([2], "said\n")


def test_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    with outlet(None) as put:
        put({"figure": 1})
    assert capsys.readouterr() == ("", "")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadOption, match="its folder does not exist"), outlet(tmp_path / "no" / "a.json"):
        pass
