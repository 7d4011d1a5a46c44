"""``torchlms run`` is python to the script: its names, its arguments, its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.runner.runs import ENVIRONMENT, both, forked_under_lms, plainly, under_lms

pytest.importorskip("typer")

SCRIPTS = {
    "names": """
        import sys
        print(__name__, __file__, __package__, __spec__, type(__loader__), __doc__, sorted(globals()))
        print(sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals(), "torch" in sys.modules)
        print(sys.excepthook is sys.__excepthook__, sys.flags.optimize)
    """,
    "stdin": "import sys; print(input()); print(sys.stdin.read())",
    "warnings": """
        import warnings
        for _ in range(3):
            warnings.warn("old", DeprecationWarning)
    """,
    "error": """
        def inner():
            raise ValueError("no")
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("because") from error
    """,
    "error in a library": "import json; json.loads('{')",
    "syntax": "x = (",
    "encoding": "# -*- coding: latin-1 -*-\\nprint('a')",
    "exit 0": "import sys; sys.exit()",
    "exit 3": "import sys; sys.exit(3)",
    "exit text": "raise SystemExit('enough')",
    "exit at once": "import os; print('out', flush=True); os._exit(7)",
    "interrupted": "raise KeyboardInterrupt",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "aborted": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "own excepthook": """
        import sys
        sys.excepthook = lambda kind, error, traceback: print(kind, error, traceback.tb_lineno)
        1 / 0
    """,
    "exit handlers": """
        import atexit, sys
        @atexit.register
        def last():
            print("last", sys.modules["__main__"].last is last, __name__)
        print("first")
    """,
    "thread": """
        import sys, threading, time
        def work():
            time.sleep(0.1)
            print("worked", sys.modules["__main__"].work is work)
        threading.Thread(target=work).start()
    """,
    "fork": """
        import os, sys
        print("before", flush=True)
        child = os.fork()
        if child:
            print("child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            print("in the child", flush=True)
            sys.exit(5)
    """,
    "fork that fails": """
        import os
        child = os.fork()
        if child:
            print("child ended with", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        else:
            raise ValueError("in the child")
    """,
    "processes": """
        import multiprocessing, sys
        def square(x):
            return x * x, __name__
        if __name__ == "__main__":
            for method in ("spawn", "fork", "forkserver"):
                with multiprocessing.get_context(method).Pool(1) as pool:
                    print(method, pool.map(square, [1, 2]))
    """,
    "pickle": """
        import pickle
        class Thing:
            pass
        print(type(pickle.loads(pickle.dumps(Thing()))) is Thing)
    """,
    "logging": """
        import logging
        print(logging.getLogger().handlers)
        logging.basicConfig(level=logging.INFO)
        logging.info("mine")
    """,
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_cannot_tell(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "sub folder"
    folder.mkdir()
    lines = SCRIPTS[name].replace("\\n", "\n").splitlines()
    script = "\n".join(line[8:] if line.startswith(" " * 8) else line for line in lines)
    (folder / "script.py").write_text(script)
    arguments = ["sub folder/script.py", "--budget", "not ours", "--", "-m", "--help"]
    plain, ours = both(*arguments, cwd=tmp_path, stdin="one\ntwo\nthree")
    assert ours == plain


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("import sys; print('package', sys.argv)")
    (folder / "part.py").write_text(
        "import sys\n"
        "from . import other\n"
        "def f(x):\n    return x + other.ONE\n"
        "if __name__ == '__main__':\n"
        "    print(__name__, __package__, __spec__.name, __file__, __spec__.origin, sys.argv, sys.path[0])\n"
        "    import multiprocessing\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(f, [1]))\n"
    )
    (folder / "other.py").write_text("ONE = 1")
    (folder / "__main__.py").write_text("import sys; from . import other; print(sys.argv, __spec__.name)")
    return tmp_path


@pytest.mark.parametrize("module", ["package.part", "package"])
def test_a_module(module: str, package: Path) -> None:
    plain, ours = both("-m", module, "--budget", "x", cwd=package)
    assert ours == plain
    assert plain.status == 0, plain.err


def test_a_folder_and_an_archive(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    main = "import sys, helper_module; print(sys.argv, sys.path[0], __name__)"
    (tmp_path / "folder" / "__main__.py").write_text(main)
    (tmp_path / "folder" / "helper_module.py").write_text("")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.write(tmp_path / "folder" / "__main__.py", "__main__.py")
        archive.write(tmp_path / "folder" / "helper_module.py", "helper_module.py")
    for target in ("folder", "archive.zip"):
        plain, ours = both(target, "1", cwd=tmp_path)
        assert ours.out == plain.out
        assert ours.status == 0, ours.err


TYPED = [SCRIPTS[name].replace("\n        ", "\n").strip() for name in ("names", "error", "thread", "syntax")]
NAMES = (
    "import sys; print(__name__, __package__, __spec__, __loader__, sorted(globals()), sys.argv, sys.path[0])"
)


@pytest.mark.parametrize("source", [NAMES, *TYPED[1:], "raise SystemExit(3)"])
def test_code_and_what_standard_input_says(source: str, tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("")
    source = f"import beside\n{source}"
    for arguments, stdin in ((["-c", source, "--budget", "x"], "more"), (["-", "--budget", "x"], source)):
        plain, ours = both(*arguments, cwd=tmp_path, stdin=stdin)
        assert ours == plain


def test_a_link_to_a_script(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "script.py").write_text("import sys; print(__file__, sys.argv, sys.path[0])")
    (tmp_path / "link.py").symlink_to(tmp_path / "real" / "script.py")
    plain, ours = both("link.py", cwd=tmp_path)
    assert ours == plain


def test_a_parent_package_that_fails(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "__init__.py").write_text("1 / 0")
    ours = under_lms("-m", "broken.part", cwd=tmp_path)
    assert ours.status == 1
    assert "ZeroDivisionError" in ours.err
    assert "torchlms" not in ours.err
    (tmp_path / "broken" / "__init__.py").write_text("import not_there_at_all")
    ours = under_lms("-m", "broken", cwd=tmp_path)
    assert "ModuleNotFoundError: No module named 'not_there_at_all'" in ours.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["missing.py"],
            "torchlms: there is no script 'missing.py'; for a module write: torchlms run -m name",
        ),
        (["-m", "missing"], "torchlms: there is no module 'missing' to run; for a file write"),
        (["-m", "json.missing"], "torchlms: there is no module 'json.missing' to run"),
        (["-m", "folder/x.py"], "for a file write: torchlms run folder/x.py\n"),
        (["-m", "folder.x.py"], "for a file write: torchlms run folder/x.py\n"),
        (["-m", "package"], "package is a package without a __main__: name a module in it"),
        (["folder"], "folder is a folder without a __main__.py: name a script in it"),
        (["folder.x"], "there is no script 'folder.x'; for a module write: torchlms run -m folder.x"),
        (["-m", "-c", "x"], "-m and -c: a module or code, not both"),
        (["--budget", "16G", "x.py"], "did you mean '16GiB' or '16GB'?"),
        (["--plan", "p.json", "x.py"], "--plan p.json: there is no such file"),
        (["--device", "tpu", "x.py"], "cannot read --device 'tpu'"),
        (["--json", "no/such/folder.json", "x.py"], "no/such/folder.json: its folder does not exist"),
        (["--csv", "/tmp", "x.py"], "/tmp is a folder: name a file"),
    ],
)
def test_what_cannot_be_begun(arguments: list[str], said: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    for name in ("x.py", "folder/x.py"):
        (tmp_path / name).write_text("print('ran')")
    ours = under_lms(*arguments, cwd=tmp_path)
    assert (ours.status, ours.out) == (2, "")
    assert said in ours.err
    assert "Traceback" not in ours.err


def test_options_that_went_to_the_script_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import sys; print(sys.argv[1:])")
    lost = forked_under_lms("x.py", "--budget=200MiB", "--disk-dir", "spill", cwd=tmp_path)
    assert (lost.status, lost.out) == (0, "['--budget=200MiB', '--disk-dir', 'spill']\n")
    for option in ("--budget", "--disk-dir"):
        assert f"{option} comes after x.py and goes to it, not to torchlms" in lost.err
    both_have_one = forked_under_lms("--budget=1GiB", "x.py", "--budget=200MiB", cwd=tmp_path)
    assert "comes after" not in both_have_one.err


def test_debug_shows_all_frames(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("1 / 0")
    done = subprocess.run(
        [sys.executable, "-m", "torchlms", "--debug", "run", "x.py"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 1
    assert "main_module.py" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_from_outside(number: signal.Signals, tmp_path: Path) -> None:
    script = "import time\nprint('ready', flush=True)\nfor _ in range(1000):\n    time.sleep(0.02)\n"
    (tmp_path / "x.py").write_text(script)
    ends = []

    def heed() -> None:
        """Also where whoever runs the tests has these ignored, as ``nohup`` does."""
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)

    for command in ([sys.executable], [sys.executable, "-m", "torchlms", "run", "--quiet"]):
        with subprocess.Popen(
            [*command, "x.py"],
            cwd=tmp_path,
            env=ENVIRONMENT,
            stdout=-1,
            stderr=-1,
            text=True,
            preexec_fn=heed,
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
        assert "torchlms" not in err
        ends.append((process.returncode, err.splitlines()[-1:]))
    assert ends[0] == ends[1]


def test_an_interrupt_that_the_script_handles(tmp_path: Path) -> None:
    script = "try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt:\n    raise SystemExit(4)\n"
    (tmp_path / "x.py").write_text(script)
    assert under_lms("x.py", cwd=tmp_path).status == 4


@pytest.mark.more
def test_settings_before_the_import_of_torch(tmp_path: Path) -> None:
    """Torch reads some of them when it is imported, so that nobody may import it before the script."""
    (tmp_path / "x.py").write_text(
        "import os, sys, importlib.util\n"
        "os.environ['OMP_NUM_THREADS'] = '2'\n"
        "print(importlib.util.find_spec('torch').name)\n"  # asking is not importing
        "import torch\n"
        "print(torch.get_num_threads(), type(torch.__loader__), type(torch.__spec__.loader))\n"
        "print(torch.cuda.is_initialized(), 'torchlms.runner.finder' in sys.modules, file=sys.stderr)\n"
    )
    plain, ours = both("x.py", cwd=tmp_path)
    assert (ours.status, ours.out) == (plain.status, plain.out)
    assert (plain.err, ours.err) == ("False False\n", "False True\n")


def test_nothing_to_do_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("print('done')")
    ours = under_lms("--report", "--json", "f.json", "--save-plan", "p.json", "x.py", cwd=tmp_path)
    assert (ours.status, ours.out) == (0, "done\n")
    assert "torchlms: the script never imported torch" in ours.err
    (tmp_path / "y.py").write_text("import torch; print(torch.ones(1))")
    ours = under_lms("--report", "--json", "f.json", "--save-plan", "p.json", "y.py", cwd=tmp_path)
    assert ours.status == 0
    assert "LMS was never on: no forward pass of a module with parameters to train was seen" in ours.err
    assert '"steps": 0' in (tmp_path / "f.json").read_text()
    assert not (tmp_path / "p.json").exists()


def test_without_a_first_path(tmp_path: Path) -> None:
    """``python -P`` puts no folder of a script in front; neither do we."""
    if not hasattr(sys.flags, "safe_path"):
        pytest.skip("Python 3.11 and later")
    (tmp_path / "x.py").write_text("import sys; print(sys.path)")
    ends = []
    for command in (["-P", "x.py"], ["-P", "-m", "torchlms", "run", "--quiet", "x.py"]):
        ends.append(plainly(*command, cwd=tmp_path).out)
    assert ends[0] == ends[1]
