"""``torchlms`` and ``python -m torchlms``: the command line, with errors as one clear line."""

from __future__ import annotations

import sys

from torchlms.errors import LMSError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a failed run, 2 for what the user can mend."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        print(
            f"torchlms: the command line needs {error.name}: pip install '.[cli]' in a clone of torchlms",
            file=sys.stderr,
        )
        return 2
    from torchlms import cli

    show = sys.excepthook
    try:
        cli.app(args=argv, prog_name="torchlms")
    except LMSError as error:
        if cli.debugging():
            raise
        print(f"torchlms: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # how typer ends, help and usage errors included
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    else:
        code = 0
    script = cli.script_to_run()
    if code or script is None:
        return code
    from torchlms.runner.command import run

    # Typer has let go by now: between the script and the interpreter there is nobody who catches anything.
    sys.excepthook = show
    return run(script)


if __name__ == "__main__":
    sys.exit(main())
