"""README and docs: every snippet runs as it stands, and every command line is one that the program takes.

Snippets of a page share one namespace, with a small network, data and a directory at hand. Commands are
read by the command line's own parser and not carried out: most take minutes, or a GPU. A snippet that only
shows where a line goes is marked with an HTML comment, ``<!-- not run -->``.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import typer
from torch import nn

import torchlms
from torchlms.cli import app

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.glob("*.md")])
ELSEWHERE = ("trainers.md",)  # tests/integrations/test_docs.py runs these, with the trainers' libraries

_SNIPPET = re.compile(r"(<!-- not run -->\n)?```python\n(.*?)```", re.DOTALL)
_COMMAND = re.compile(r"^ {4}((?:torchlms|python|make|pip) .*?)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def snippets(page: Path) -> list[str]:
    return [code for mark, code in _SNIPPET.findall(page.read_text()) if not mark]


def commands(page: Path) -> list[str]:
    text = page.read_text().replace("\\\n", " ")
    return [line.split("  #")[0].strip() for line in _COMMAND.findall(text)]


WITH_SNIPPETS = [page for page in PAGES if snippets(page) and page.name not in ELSEWHERE]
COMMANDS = sorted({command for page in PAGES for command in commands(page)})


@pytest.mark.parametrize("page", WITH_SNIPPETS, ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
    namespace: dict[str, Any] = {
        "torch": torch,
        "torchlms": torchlms,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.CrossEntropyLoss(),
        "loader": [(torch.randn(256, 16), torch.randint(0, 4, (256,))) for _ in range(8)],
        "directory": tmp_path,
        "train": _train,
    }
    for code in snippets(page):
        exec(compile(code, str(page.name), "exec"), namespace)
    assert torchlms.stats() == {"state": "off"}


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, loader: list[Any]) -> None:
    for x, y in loader:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_read(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "torchlms":
        _read(words[1:])
    elif words[:3] == ["python", "-m", "torchlms"]:
        _read(words[3:])
    elif words[:2] == ["python", "-m"]:
        folder = ROOT.joinpath(*words[2].split("."))
        inside = ROOT.joinpath("src", *words[2].split("."))
        assert any(path.exists() for path in (folder / "__main__.py", inside.with_suffix(".py"), inside))
    elif words[0] == "python":
        assert (ROOT / words[1]).exists() or (ROOT / "examples" / words[1]).exists(), words[1]
    else:
        assert words[0] == "pip"
        _check_extras(command)


def _read(words: list[str]) -> None:
    """Parse, and do nothing."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("torchlms", list(words))
    left = [*getattr(context, "_protected_args", []), *context.args]
    if not left:
        return
    name, verb, rest = group.resolve_command(context, left)
    verb.make_context(name, rest, parent=context)


def _check_extras(command: str) -> None:
    known = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
    for extras in re.findall(r"\[([a-z,]+)\]", command):
        assert set(extras.split(",")) <= known, command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert missing == []


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    assert [
        page.name for page in DOCS.glob("*.md") if page.name != "README.md" and page.name not in index
    ] == []


def test_the_site_has_every_page() -> None:
    nav = re.findall(r"^  - .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(nav) == sorted(page.name for page in DOCS.glob("*.md"))


def test_the_api_is_that_of_the_docstrings() -> None:
    before = (DOCS / "api.md").read_text()
    code = "import sys; sys.path.insert(0, 'docs'); import api; sys.stdout.write(api.text())"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == before, "write it anew: python docs/api.py"


def test_every_rule_is_explained() -> None:
    page = (DOCS / "tuning.md").read_text()
    assert [name for name in torchlms.Rules.__slots__ if f"`{name}`" not in page] == []


def test_every_error_is_explained() -> None:
    page = (DOCS / "limits.md").read_text()
    names = [name for name in torchlms.__all__ if isinstance(getattr(torchlms, name), type)]
    errors = [name for name in names if issubclass(getattr(torchlms, name), torchlms.LMSError)]
    assert [name for name in errors if f"`{name}`" not in page and name != "LMSError"] == []
