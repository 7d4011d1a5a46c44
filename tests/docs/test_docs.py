"""README and docs: every snippet runs as it stands, links lead somewhere, and the site can be built.

Snippets of a page share one namespace, with a small network, data and a directory at hand. A snippet that
only shows where a line goes is marked with an HTML comment, ``<!-- not run -->``. ``test_commands.py``
carries out the commands.
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
from torch import nn

import torchlms
from tests.docs.commands import DOCS, NOT_RUN, PAGES, ROOT

ELSEWHERE = ("trainers.md",)  # tests/integrations/test_docs.py runs these, with the trainers' libraries

_SNIPPET = re.compile(r"(<!-- not run -->\n)?```python\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def snippets(page: Path) -> list[str]:
    return [code for mark, code in _SNIPPET.findall(page.read_text()) if not mark]


WITH_SNIPPETS = [page for page in PAGES if snippets(page) and page.name not in ELSEWHERE]


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


@pytest.mark.parametrize("command", NOT_RUN)
def test_other_commands_are_there(command: str) -> None:
    """Those that ``test_commands.py`` does not carry out."""
    words = shlex.split(command)
    if words[0] == "make":
        assert words[1] in re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert words[:2] == ["pip", "install"]
        known = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        for extras in re.findall(r"\[([a-z,]+)\]", command):
            assert set(extras.split(",")) <= known


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


def test_the_limits_are_all_on_their_page() -> None:
    """README's list of what LMS does not do names nothing that docs/limits.md leaves out."""
    inside = re.search(r"## What it does not do yet\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)
    assert inside
    page = (DOCS / "limits.md").read_text()
    assert [name for name in re.findall(r"`([a-z_.]+)`", inside.group(1)) if name not in page] == []
    assert "Writes that nobody can see" in page


def test_the_site_can_be_built(tmp_path: Path) -> None:
    """With every warning an error: a page that nothing leads to, a link to an anchor that is not there."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {path.parent.name for path in tmp_path.glob("*/index.html")} >= {"run", "limits", "report"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_are_there(page: Path) -> None:
    named = set(re.findall(r"\btorchlms\.([A-Za-z_]+)\b(?!\.)(?=[(`])", page.read_text()))
    assert not [name for name in sorted(named) if not hasattr(torchlms, name)]
