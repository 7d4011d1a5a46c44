"""Forked: programs run as by ``python``, in forks of one process that has torch imported already.

A process of its own spends seconds in the import of torch, and as many in what the first optimizer imports; a
fork of ``fork_server.py`` begins behind that. Each has its own folder, environment and files, and ends as an
interpreter ends. It is not for tests of how a process begins, of which modules it loads, or of a traceback's
first line: those start python.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 200
Files = tuple[int, int, int]  # standard input, output, and error


@dataclass(frozen=True)
class Ended:
    status: int  # negative: the signal that ended it
    out: str
    err: str


def run(*words: str, cwd: Path, environment: Mapping[str, str] = os.environ, stdin: str = "") -> Ended:
    """A script and its arguments, ``-c`` and a program, or ``torchlms`` and a verb."""
    with TemporaryFile() as given, TemporaryFile() as out, TemporaryFile() as err:
        given.write(stdin.encode())
        given.seek(0)
        status = run_with(
            (given.fileno(), out.fileno(), err.fileno()), *words, cwd=cwd, environment=environment
        )
        out.seek(0)
        err.seek(0)
        return Ended(status, out.read().decode(), err.read().decode())


def run_with(files: Files, *words: str, cwd: Path, environment: Mapping[str, str] = os.environ) -> int:
    """With these files; its exit status."""
    global _server
    if _server is None:
        _server = _Server()
    try:
        return _server.run(files, words, cwd, environment)
    except BaseException:  # it may still be busy with this program; the next one gets another
        end()
        raise


def end() -> None:
    """End the server, and whatever it runs, if there is one."""
    global _server
    if _server is not None:
        _server.end()
        _server = None


@dataclass
class _Server:
    """The process, in a session of its own: an interrupt from the keyboard is for the tests alone."""

    _asks: socket.socket = field(init=False)
    _process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self._asks, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._asks.settimeout(TIMEOUT_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "fork_server.py"), str(theirs.fileno())],
                # What libraries read as they are imported must be what the programs are to have.
                env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def run(self, files: Files, words: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> int:
        request = {"words": words, "folder": str(cwd), "environment": dict(environment)}
        socket.send_fds(self._asks, [json.dumps(request).encode()], files)
        answer = self._asks.recv(100)
        assert answer, "the fork server has ended; what it said last is on standard error"
        status: int = json.loads(answer)
        return status

    def end(self) -> None:
        self._asks.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


_server: _Server | None = None
