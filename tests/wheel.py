"""The installed wheel, tried by `make wheel` where src/ is not seen: all files are in it, and it works."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torchlms

SOURCE = Path(__file__).resolve().parent.parent / "src" / "torchlms"
# Files that are not Python are easily forgotten, and missed only when they are used: these are named.
DATA = {"py.typed", "report_page/page.html", "report_page/page.css", "report_page/page.js"}
TRAIN = """
import torch, torchlms
from torchlms.report_page import save_run
model = torch.nn.Sequential(*[torch.nn.Linear(256, 256), torch.nn.ReLU()] * 4)
with torchlms.LMS(model, budget="1GiB") as lms:
    for _ in range(5):
        model(torch.ones(64, 256)).sum().backward()
    save_run(lms, "run.json")
"""


def main() -> None:
    installed = Path(torchlms.__file__).parent
    assert "wheel-venv" in installed.parts, f"not the wheel's: {installed}"
    assert metadata.version("torchlms") == torchlms.__version__
    assert files(installed) >= files(SOURCE) | DATA, sorted((files(SOURCE) | DATA) - files(installed))
    with tempfile.TemporaryDirectory() as place:
        run("-m", "torchlms", "--help", place=place)
        run("-c", TRAIN, place=place)
        run("-m", "torchlms", "report", "run.json", "--no-curve", place=place)
        assert "<svg" in (Path(place) / "run.html").read_text()
    print(f"wheel: {torchlms.__version__}, {len(files(installed))} files, trains and draws its page")


def files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in found}


def run(*words: str, place: str) -> None:
    done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    main()
