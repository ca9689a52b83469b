"""Results as JSON lines, on standard output and in a file, each at once: a run that is cut off keeps what it measured.

Also how such a run ends: SIGTERM becomes SystemExit, so that what the benchmark started is stopped too.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path


class JsonLines:
    """Writes lines. `path`: a file to append them to as well; None: no file."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = path.open("a", encoding="utf-8") if path else None

    def write(self, **values: object) -> None:
        """One line, its numbers rounded to five significant digits."""
        text = json.dumps({name: rounded(value) for name, value in values.items()})
        print(text, flush=True)
        if self._file is not None:
            self._file.write(text + "\n")
            self._file.flush()

    def put(self, what: str, **values: object) -> None:
        """One line; `what` is its kind."""
        self.write(what=what, **values)

    def begin(self, argv: Sequence[str], **values: object) -> None:
        """The first line of a run: its command and its machine."""
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        load = round(os.getloadavg()[0], 1)
        self.put("run", at=at, argv=list(argv), machine=platform.machine(), cores=os.cpu_count(), load=load, **values)


def rounded(value: object) -> object:
    """Numbers to five significant digits, in nested values too."""
    match value:
        case float():
            return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
        case dict():
            return {name: rounded(each) for name, each in value.items()}
        case list() | tuple():
            return [rounded(each) for each in value]
    return value


def exit_on_sigterm() -> None:
    """SIGTERM raises SystemExit in the main thread, as Ctrl-C raises KeyboardInterrupt."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
