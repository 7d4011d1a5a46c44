"""Main module: a script or a module of the user's, executed as ``python`` would execute it.

[Note: Not by runpy] ``runpy.run_path`` lends ``__main__`` and takes it back when the script's last line has
run, while threads, exit handlers and worker processes still look there. Here ``__main__`` stays replaced.
"""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

from torchlms.errors import BadOption

STDIN = "-"  # in the place of a script


@dataclass(frozen=True, slots=True)
class MainModule:
    """Code, and the names that its module has before the first line."""

    code: CodeType
    facts: dict[str, Any]

    def execute(self) -> None:
        """Execute the code in a new ``__main__``; whatever it raises comes out unchanged."""
        main = ModuleType("__main__")
        vars(main).update(self.facts, __builtins__=builtins, __annotations__={})
        _replaced.append(sys.modules["__main__"])
        sys.modules["__main__"] = main
        exec(self.code, vars(main))


_replaced: list[ModuleType] = []  # still executing, so they must live on


def load(
    target: str, arguments: tuple[str, ...], *, as_module: bool = False, as_code: bool = False
) -> MainModule:
    """The script, module or code ``target``, or what standard input says if it is ``-``; sets ``sys.argv``
    and ``sys.path[0]``. BadOption if there is none."""
    if as_module:
        return _module(target, arguments)
    if as_code:
        return _text(target.encode(), "<string>", ["-c", *arguments], {})
    if target == STDIN:
        facts = {"__file__": "<stdin>", "__cached__": None}
        return _text(sys.stdin.buffer.read(), "<stdin>", [STDIN, *arguments], facts)
    if os.path.isdir(target) or _is_archive(target):
        if os.path.isdir(target) and not os.path.isfile(os.path.join(target, "__main__.py")):
            raise BadOption(f"{target} is a folder without a __main__.py: name a script in it")
        _set_first_path(os.path.abspath(target))
        main = _module("__main__", arguments)
        sys.argv[0] = target
        return main
    return _script(target, arguments)


def _script(path: str, arguments: tuple[str, ...]) -> MainModule:
    absolute = os.path.abspath(path)
    sys.argv = [path, *arguments]
    _set_first_path(os.path.dirname(os.path.realpath(path)))
    with io.open_code(absolute) as file:
        source = file.read()
    code: CodeType = compile(source, absolute, "exec", dont_inherit=True)
    loader = SourceFileLoader("__main__", absolute)
    facts = {"__file__": absolute, "__cached__": None, "__loader__": loader, "__package__": None}
    return MainModule(code, facts)


def _text(source: bytes, name: str, argv: list[str], facts: dict[str, Any]) -> MainModule:
    """Code that is in no file."""
    sys.argv = argv
    _set_first_path("")
    code: CodeType = compile(source, name, "exec", dont_inherit=True)
    return MainModule(code, {"__loader__": BuiltinImporter, "__package__": None, **facts})


def _module(target: str, arguments: tuple[str, ...]) -> MainModule:
    sys.argv = ["-m", *arguments]  # what packages see while the module is looked for
    if target != "__main__":
        _set_first_path(os.getcwd())
    spec = _find(target)
    get_code = getattr(spec.loader, "get_code", None)
    code = get_code(spec.name) if get_code is not None else None
    if code is None:
        raise BadOption(f"there is no code to run in {target!r}: is it an extension module?")
    sys.argv[0] = spec.origin or target
    facts = {
        "__file__": spec.origin,
        "__cached__": spec.cached,
        "__loader__": spec.loader,
        "__package__": spec.parent,
        "__spec__": spec,
    }
    return MainModule(code, facts)


def _find(name: str) -> ModuleSpec:
    """The spec of module ``name``, or of ``name.__main__`` if it is a package."""
    if "/" in name or (
        name.endswith(".py") and os.path.isfile(_path_of(name))
    ):  # looking for it would run it
        raise _no_module(name)
    main = sys.modules.pop("__main__")  # else a search for "__main__" ends there
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
            if spec is None:
                raise BadOption(f"{name} is a package without a __main__: name a module in it")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that a package on the way wanted
        spec = None
    finally:
        sys.modules["__main__"] = main
    if spec is None:
        raise _no_module(name)
    return spec


def _no_module(name: str) -> BadOption:
    return BadOption(f"there is no module {name!r} to run; for a file write: torchlms run {_path_of(name)}")


def _path_of(name: str) -> str:
    """The file that may have been meant by a name after ``-m``."""
    if name.endswith(".py") and "/" in name:
        return name
    return f"{name.removesuffix('.py').replace('.', '/')}.py"


def _is_archive(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _set_first_path(folder: str) -> None:
    """Put ``folder`` where the folder of our own command stands, as python does."""
    if getattr(sys.flags, "safe_path", False):
        return  # neither is there then
    sys.path[0:1] = [folder]


# Where the user's code begins: whoever calls it is not seen in the traceback of a script run alone.
BEGIN = frozenset(
    function.__code__ for function in (MainModule.execute, load, _script, _text, _module, _find)
)
