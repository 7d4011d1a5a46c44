"""A headless Chromium, spoken to over two pipes: opens a page as a phone or a desktop would, and looks."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
WHY_NOT = "no Chromium on PATH, so nobody looks at the page: apt install chromium"
_PATIENCE_S = 60.0
# It listens on descriptor 3 and speaks on 4, whatever the pipes' own numbers are.
_AS_3_AND_4 = """
import os, sys
ends = [int(end) for end in sys.argv[1:3]]
while min(ends) < 5:
    ends = [os.dup(end) for end in ends]
for end, number in zip(ends, (3, 4)):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
_MEASURE = (Path(__file__).parent / "picture.js").read_text()


@dataclass(frozen=True)
class Picture:
    """``corner``: the colour at the upper left. Shares: of ``lines`` on which there is anything else than
    that, and of pixels that are ``coloured``, not grey."""

    width: int
    corner: list[int]
    colours: int
    lines: float
    coloured: float


@dataclass(frozen=True)
class Seen:
    """``complaints``: what the console said, and errors. ``loaded_ms``: until all was loaded and laid out."""

    said: dict[str, Any]
    loaded_ms: float
    complaints: list[str]
    picture: Picture


@dataclass
class Browser:
    profile: Path
    _process: subprocess.Popen[bytes] = field(init=False)
    _rest: bytes = field(default=b"", init=False)
    _last: int = field(default=0, init=False)
    _events: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __enter__(self) -> Self:
        read_by_it, self._to = os.pipe()
        self._from, written_by_it = os.pipe()
        options = (
            "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run "
            "--disable-background-networking --hide-scrollbars --remote-debugging-pipe"
        )
        process = [str(BROWSER), *options.split(), f"--user-data-dir={self.profile}"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AS_3_AND_4, str(read_by_it), str(written_by_it), *process],
            pass_fds=(read_by_it, written_by_it),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_by_it)
        os.close(written_by_it)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._to)
        os.close(self._from)

    def look(self, path: Path, *, width_px: int, height_px: int, dark: bool, use: str) -> Seen:
        """Open the page and carry out the expression ``use``, whose value is what is ``said``."""
        page = self._ask("Target.createTarget", url="about:blank")["targetId"]
        session = self._ask("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self._events.clear()

        def ask(method: str, **options: Any) -> dict[str, Any]:
            return self._ask(method, session, **options)

        def value(expression: str) -> Any:
            found = ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
            assert "exceptionDetails" not in found, found["exceptionDetails"]
            return found["result"]["value"]

        for domain in ("Page", "Runtime", "Log"):
            ask(f"{domain}.enable")
        size = {"width": width_px, "height": height_px}
        ask("Emulation.setDeviceMetricsOverride", **size, deviceScaleFactor=1, mobile=width_px < 700)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        ask("Emulation.setEmulatedMedia", features=[scheme])
        ask("Page.navigate", url=path.as_uri())
        self._wait_for("Page.loadEventFired")
        loaded_ms = value("(document.body.getBoundingClientRect(), performance.now())")
        picture = ask("Page.captureScreenshot", format="png")["data"]
        said = value(use)
        measured = value(_MEASURE.replace("PICTURE", picture))
        complaints = [json.dumps(event["params"]) for event in self._events if _complains(event)]
        self._ask("Target.closeTarget", targetId=page)
        return Seen(said, loaded_ms, complaints, Picture(**measured))

    def _ask(self, method: str, session: str | None = None, **options: Any) -> dict[str, Any]:
        self._last += 1
        question = {"id": self._last, "method": method, "params": options}
        if session is not None:
            question["sessionId"] = session
        os.write(self._to, json.dumps(question).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._last:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _wait_for(self, event: str) -> None:
        while not any(seen["method"] == event for seen in self._events):
            self._next()

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _PATIENCE_S
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            more = os.read(self._from, 1 << 20) if ready else b""
            assert more, f"the browser says nothing more; it ended with {self._process.poll()}"
            self._rest += more
        text, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message


def _complains(event: dict[str, Any]) -> bool:
    return event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
