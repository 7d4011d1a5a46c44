"""The tests that take long: `make test` leaves them to `make long`; CI runs a third of them, another one for
each commit.

tests/long.txt names them, one a line. To have it written anew, on a machine with nothing else to do:

    make pytest ARGS="-m 'not slow and not more' --durations=0" > durations.txt
    python -m tests.long durations.txt
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LIST = Path(__file__).with_suffix(".txt")
LONG_S = 1.0
_TOOK = re.compile(r"^([\d.]+)s call +(\S.*)$", re.MULTILINE)


def listed() -> frozenset[str]:
    return frozenset(LIST.read_text().splitlines())


def write(said: str) -> None:
    took = {name: float(seconds) for seconds, name in _TOOK.findall(said)}
    LIST.write_text("".join(f"{name}\n" for name in sorted(took) if took[name] >= LONG_S))


if __name__ == "__main__":
    write(Path(sys.argv[1]).read_text())
