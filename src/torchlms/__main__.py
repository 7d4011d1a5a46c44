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
        print(f"torchlms: the command line needs {error.name}: pip install 'torchlms[cli]'", file=sys.stderr)
        return 2
    from torchlms import cli

    try:
        cli.app(args=argv, prog_name="torchlms")
    except LMSError as error:
        if cli.debugging():
            raise
        print(f"torchlms: {error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # how typer ends, help and usage errors included
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
