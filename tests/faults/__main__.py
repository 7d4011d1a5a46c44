"""Inject faults at random moments, or out of memory at every op of two steps.

    python -m tests.faults --count 1000 --seed 1 [--json FILE]
    python -m tests.faults --every-op [--stride 1] [--json FILE]

Prints each trial in which something was wrong, and a table. Ends with 1 if there was any.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "eager"), str(ROOT / "core")]

from faults.campaign import main  # noqa: E402

sys.exit(main())
