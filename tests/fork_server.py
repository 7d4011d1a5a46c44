"""Fork server: a process that has imported torch and torchlms, and forks into each program it is asked for.

``forked.py`` starts it and asks. It computes nothing, so that a fork has no threads but its own. A program is
the last thing that this file executes, with nobody around it: exit handlers, threads, signals and the status
are left to the interpreter. What comes behind its end, the destructors of torch's C++, takes longer than all
of it and is left out. Of an error that nobody catches the traceback begins with this file's own line.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch._dynamo  # noqa: F401, as the first optimizer does

import torchlms.cli
import torchlms.runner.command

MESSAGE_BYTES = 1 << 20
COMMAND = (
    "import sys; from torchlms.__main__ import main; sys.exit(main())"  # as that of an installed package
)


def next_program(server: socket.socket) -> CodeType:
    """Fork at each request, and answer with how the fork has ended; returns in forks only."""
    while True:
        message, files, _, _ = socket.recv_fds(server, MESSAGE_BYTES, 3)
        if not message:  # nobody is left to ask
            sys.exit()
        process = os.fork()
        if process == 0:
            server.close()
            end_with_the_interpreter()
            return become(files, **json.loads(message))
        for file in files:
            os.close(file)
        _, status = os.waitpid(process, 0)
        server.send(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def end_with_the_interpreter() -> None:
    """Of the C library's exit handlers, the one that is called first ends the process, with its status."""
    library = ctypes.CDLL(None)
    if hasattr(library, "on_exit"):
        library.on_exit(library._exit, None)


def become(files: list[int], words: list[str], folder: str, environment: dict[str, str]) -> CodeType:
    """Set up what a process has of its own, and read its program."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        return compile(words[1], "<string>", "exec", dont_inherit=True)
    sys.argv = words
    if words[0] == "torchlms":
        return compile(COMMAND, "<torchlms>", "exec", dont_inherit=True)
    path = Path(words[0])
    sys.path[0] = str(path.resolve().parent)
    return compile(path.read_bytes(), str(path.absolute()), "exec", dont_inherit=True)


def main_module(code: CodeType) -> dict[str, Any]:
    """The names of a new ``__main__``."""
    main = ModuleType("__main__")
    if not code.co_filename.startswith("<"):
        main.__file__ = code.co_filename
    sys.modules["__main__"] = main
    return vars(main)


if __name__ == "__main__":
    torchlms.LMS  # noqa: B018, comes with all that is needed to use it
    server = socket.socket(fileno=int(sys.argv[1]))
    before = sys.modules["__main__"]  # executes until the end, and so must live on
    gc.collect()
    gc.freeze()  # or each fork would go through all that is imported, and get a copy of it
    code = next_program(server)
    exec(code, main_module(code))
