"""The house has floors, and imports go down only. Read from the source by ast; nothing is imported here.

cli -> report_page -> fit -> bench
cli, integrations, bench  ->  api  ->  eager  ->  memory
all may read core and errors; core and memory do not know each other; core has no torch
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "torchlms"
FILES = sorted(PACKAGE.rglob("*.py"))

BASE = {"core", "errors"}
TOP = {"__main__", "cli", "integrations", "bench", "doctor", "fit", "runner", "steps", "sweep"}

# Part of the package -> what it may import, apart from itself. The bare `import torchlms` counts as api.
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "loudness": {"errors"},
    "outlet": {"errors"},
    "uninterrupted": set(),
    "memory": {"errors", "uninterrupted"},
    "eager": BASE | {"memory"},
    "options": BASE | {"memory", "rule_text"},
    "race": {"core", "eager"},
    "rule_text": BASE | {"memory"},
    "maker": BASE,
    "referee": BASE | {"eager", "maker", "race"},
    "director": BASE | {"eager", "memory", "maker", "referee"},
    "check": BASE | {"eager"},
    "statistics": BASE | {"eager", "memory", "report"},
    "report": BASE | {"memory"},
    "api": BASE
    | {"uninterrupted"}
    | {
        "eager",
        "memory",
        "options",
        "director",
        "statistics",
        "report",
        "check",
        "loudness",
        "uninterrupted",
    },
    "__init__": BASE | {"api"},
    "integrations": {"api", "core", "errors", "outlet", "steps"},
    "steps": {"api", "outlet"},
    "sweep": BASE | {"eager"},
    "bench": BASE | {"eager", "memory", "report", "api", "rule_text", "outlet"},
    "fit": BASE | {"eager", "memory", "report", "api", "bench", "rule_text", "outlet"},
    "live": {"memory"},
    "report_page": BASE | {"memory", "report", "api", "fit", "outlet"},
    "doctor": BASE | {"eager", "memory", "api"},
    "runner": BASE
    | {"eager", "memory", "report", "api", "rule_text", "report_page", "outlet", "loudness", "live", "steps"},
    "cli": BASE
    | {
        "eager",
        "memory",
        "report",
        "report_page",
        "api",
        "bench",
        "doctor",
        "fit",
        "runner",
        "live",
        "loudness",
        "outlet",
    },
    "__main__": {"cli", "bench", "runner", "api", "errors"},
}

# The sweep runs torch's own operator samples, which torch keeps for its tests.
SAMPLES = PACKAGE / "sweep" / "samples.py"
PRIVATE_TORCH = PACKAGE / "eager" / "private.py"
# Private by name, documented in public: the home of TorchDispatchMode, and of tree_map.
OPEN_TORCH_MODULES = ("torch.utils._python_dispatch", "torch.utils._pytree")
# Operators such as torch.ops.aten._softmax are names of data, listed by every trace, not Python internals.
OPERATORS = "torch.ops."


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    wrong = upward_imports(part_of(path), imports_of(ast.parse(path.read_text()), path))
    assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_private_torch_lives_in_one_file(path: Path) -> None:
    if path in (PRIVATE_TORCH, SAMPLES):
        pytest.skip("this is the file")
    wrong = private_torch(ast.parse(path.read_text()))
    assert not wrong, f"{path.relative_to(ROOT)}: {wrong}; it belongs into eager/private.py, with a test"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_assigns_forward(path: Path) -> None:
    if part_of(path) == "bench":
        pytest.skip("networks of our own")
    wrong = assigned_forward(ast.parse(path.read_text()))
    assert not wrong, f"{path.relative_to(ROOT)}: .forward assigned in lines {wrong}"


def test_committed_text_names_no_machine() -> None:
    """Paths of the machine it was written on, and where its packages came from, help no reader."""
    # Written so that no pattern matches itself: this file has to pass, too.
    forbidden = re.compile(
        "|".join(
            [
                r"(?<![\w.])/(?:home|root|work|Users)/",
                r"pypi[.]org|pythonhosted[.]|npmjs[.]org|download[.]pytorch",
                r"(?i:find[-_]links\b|extra[-_]index[-_]url)",
            ]
        )
    )
    wrong = []
    for path in committed_files():
        data = path.read_bytes() if path.is_file() else b""
        if b"\0" in data[:8000]:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if match := forbidden.search(line):
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {match.group()}")
    assert not wrong, "\n".join(wrong)


# How the source is read. Each reader has a test of its own at the end, for a guard that sees nothing
# passes everything.


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(tree: ast.Module, path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of each import, those inside functions and TYPE_CHECKING included."""
    package = ["torchlms", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            if module == "torchlms":  # `from torchlms import core` names a part, `... import LMS` the api
                yield from ((node.lineno, f"torchlms.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, module


def upward_imports(part: str, imports: Iterator[tuple[int, str]]) -> list[str]:
    if part not in MAY_IMPORT:
        return [f"{part} has no place in MAY_IMPORT yet"]
    wrong = []
    for line, name in imports:
        first, _, rest = name.partition(".")
        if first == "torchlms":
            target = rest.split(".")[0]
            target = target if target in MAY_IMPORT else "api"  # a public name
            if target != part and target not in MAY_IMPORT[part]:
                wrong.append(f"line {line}: {part} may not import {name}")
        elif part == "core" and first != "numpy" and first not in sys.stdlib_module_names:
            wrong.append(f"line {line}: core may import the standard library and numpy, not {name}")
        elif part == "errors" and first not in sys.stdlib_module_names:
            wrong.append(f"line {line}: errors may import the standard library, not {name}")
    return wrong


def private_torch(tree: ast.Module) -> list[str]:
    """Underscored names below torch: `torch._C.x`, `from torch._x import y`, `getattr(torch, "_x")`."""
    local = {}  # name in this file -> dotted name below torch
    wrong = []

    def check(line: int, dotted: str) -> None:
        rest = dotted
        for module in OPEN_TORCH_MODULES:
            if dotted == module or dotted.startswith(module + "."):
                rest = dotted[len(module) :]
        private = [n for n in rest.split(".") if n.startswith("_") and not n.endswith("__")]
        if private and not dotted.startswith(OPERATORS):
            wrong.append(f"line {line}: {dotted}")

    def dotted_name(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return local.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = dotted_name(node.value)
            return f"{owner}.{node.attr}" if owner else None
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    local[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    check(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            for alias in node.names if node.module.split(".")[0] == "torch" else []:
                local[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                check(node.lineno, f"{node.module}.{alias.name}")

    inner = {n.value for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node not in inner:  # the whole chain, once
            chain: ast.expr = node
            dotted = dotted_name(chain)
            if dotted:
                check(node.lineno, dotted)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            owner = dotted_name(node.args[0]) if node.args else None
            name = node.args[1] if len(node.args) > 1 else None
            if owner and isinstance(name, ast.Constant) and isinstance(name.value, str):
                check(node.lineno, f"{owner}.{name.value}")
    return wrong


def assigned_forward(tree: ast.Module) -> list[int]:
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "forward" and not isinstance(node.ctx, ast.Load):
            lines.append(node.lineno)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and name.value == "forward":
                lines.append(node.lineno)
    return lines


def committed_files() -> list[Path]:
    git = shutil.which("git")
    if git is None:
        pytest.skip("git is not installed")
    listed = subprocess.run([git, "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listed.returncode != 0 or not listed.stdout:
        pytest.skip("not a git checkout, or nothing committed yet")
    return [ROOT / name for name in listed.stdout.split("\0") if name]


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("core/plan.py", "import torch"),
        ("core/plan.py", "def f():\n    from torchlms.memory import arena"),
        ("core/plan.py", "from ..memory import arena"),
        ("core/plan.py", "from .. import memory"),
        ("memory/arena.py", "from torchlms.core.plan import Plan"),
        ("memory/arena.py", "import torchlms"),
        ("eager/save.py", "from torchlms import LMS"),
        ("eager/save.py", "from ..bench import networks"),
        ("bench/run.py", "from torchlms.fit.scale import Scale"),
        ("fit/curve.py", "from torchlms.report_page import save_run"),
        ("report_page/page.py", "from torchlms.eager.engine import Engine"),
        ("api.py", "from .cli import main"),
        ("attic.py", ""),
    ],
)
def test_the_guard_sees_upward_imports(where: str, source: str) -> None:
    path = PACKAGE / where
    assert upward_imports(part_of(path), imports_of(ast.parse(source), path))


@pytest.mark.parametrize(
    ("where", "source"),
    [
        (
            "core/plan.py",
            "import json\nimport numpy as np\nfrom .tape import Tape\nfrom ..errors import LMSError",
        ),
        ("memory/arena.py", "import torch\nfrom . import disk"),
        ("eager/save.py", "from ..core.tape import Tape\nfrom torchlms.memory.arena import Arena"),
        ("__init__.py", "from .api import LMS\nfrom .errors import LMSError"),
        ("bench/run.py", "import torchlms\nfrom torchlms import LMS"),
    ],
)
def test_the_guard_lets_downward_imports_pass(where: str, source: str) -> None:
    path = PACKAGE / where
    assert not upward_imports(part_of(path), imports_of(ast.parse(source), path))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._cuda_getDevice()",
        "import torch as t\nt.cuda._lazy_init",
        "from torch._C import _autograd",
        "import torch._dynamo",
        "from torch import cuda\ncuda._sleep(1)",
        "from torch.utils._python_dispatch import _disable_current_modes",
        "from torch.nn.modules import module as m\ndel m._global_forward_hooks",
        "import torch\ngetattr(torch, '_C')",
    ],
)
def test_the_guard_sees_private_torch(source: str) -> None:
    assert private_torch(ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.cuda.Stream().__enter__",
        "from torch.utils._python_dispatch import TorchDispatchMode",
        "from torch.utils import _pytree as pytree\npytree.tree_map",
        "import torch\ntorch.ops.aten._softmax.default",
        "import other\nother._private",
    ],
)
def test_the_guard_lets_public_torch_pass(source: str) -> None:
    assert not private_torch(ast.parse(source))


@pytest.mark.parametrize(
    "source", ["m.forward = f", "m.forward: int = f", "del m.forward", "setattr(m, 'forward', f)"]
)
def test_the_guard_sees_an_assigned_forward(source: str) -> None:
    assert assigned_forward(ast.parse(source))
    assert not assigned_forward(ast.parse("y = m.forward(x)"))
