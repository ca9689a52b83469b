"""What a benchmark found, as JSON lines: on standard output and in a file, each at once, so that a run that is cut off
keeps what it had. And how such a run ends: SIGTERM is an exception, so that whatever it started is ended too."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
import time
from pathlib import Path


class Lines:
    """`path`: a file to add them to as well; None: none."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("a", encoding="utf-8") if path else None

    def put(self, what: str, **values: object) -> None:
        """One line; `what` says of which kind."""
        text = json.dumps({"what": what, **{name: rounded(value) for name, value in values.items()}})
        print(text, flush=True)
        if self._file is not None:
            self._file.write(text + "\n")
            self._file.flush()

    def begin(self, argv: list[str], **values: object) -> None:
        """Under what circumstances the others came about."""
        at = time.strftime("%Y-%m-%d %H:%M:%S")
        load = round(os.getloadavg()[0], 1)
        self.put("run", at=at, argv=argv, machine=platform.machine(), cores=os.cpu_count(), load=load, **values)


def rounded(value: object) -> object:
    """Five digits that count, in what is nested too."""
    match value:
        case float():
            return float(f"{value:.5g}") if abs(value) < 1e5 else round(value)
        case dict():
            return {name: rounded(each) for name, each in value.items()}
        case list() | tuple():
            return [rounded(each) for each in value]
    return value


def end_on_sigterm() -> None:
    """As Ctrl-C does."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
