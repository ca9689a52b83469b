"""The searches of `place` in processes of their own, as many at once as there are cores, with a progress bar.

Each child is the same command for one split alone; it prints one row of JSON. A split is searched from the best rate
that is known when it begins: one that is not good at a quarter of it is given up early.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence

from baton.node.errors import SettingsError
from baton.simulator.report import GOODPUT, Row

BAR = 24
POLL_S = 0.2


class Searches:
    """One search a split. `argv` is the user's."""

    def __init__(self, argv: Sequence[str], names: Sequence[str], first_rate: float, jobs: int) -> None:
        self._argv, self._names, self._jobs = list(argv), list(names), jobs
        self._best = first_rate
        self._rows: dict[str, Row] = {}
        self._running: dict[str, subprocess.Popen[str]] = {}
        self._began_at = time.monotonic()

    def run(self) -> list[Row]:
        """The rows, the best first. Raises SettingsError where a search fails."""
        waiting = list(self._names)
        try:
            while waiting or self._running:
                while waiting and len(self._running) < self._jobs:
                    name = waiting.pop(0)
                    self._running[name] = self._start(name)
                self._show()
                time.sleep(POLL_S)
                for name in [name for name, child in self._running.items() if child.poll() is not None]:
                    self._take(name, self._running.pop(name))
        finally:
            for child in self._running.values():
                child.kill()
            self._show()
            print(file=sys.stderr)
        return sorted(self._rows.values(), key=lambda row: -float(row[GOODPUT]))

    def _start(self, name: str) -> subprocess.Popen[str]:
        more = ("--only", name, "--first-rate", f"{self._best:g}", "--json")
        command = (sys.executable, "-P", "-m", "baton.simulator", "place", *self._argv, *more)
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _take(self, name: str, child: subprocess.Popen[str]) -> None:
        printed, _ = child.communicate()
        if child.returncode:
            raise SettingsError(f"the search of {name} ended with status {child.returncode}")
        self._rows[name] = json.loads(printed)
        self._best = max(self._best, *(float(row[GOODPUT]) for row in self._rows.values()))

    def _show(self) -> None:
        done, total = len(self._rows), len(self._names)
        filled = BAR * done // total
        best = max(self._rows.values(), key=lambda row: float(row[GOODPUT]), default=None)
        text = f"; best: {best['split']}, {float(best[GOODPUT]):.4g} requests/s" if best else ""
        bar = "#" * filled + "-" * (BAR - filled)
        seconds = time.monotonic() - self._began_at
        print(f"\r[{bar}] {done} of {total} splits, {seconds:.0f} s{text}", end="", file=sys.stderr, flush=True)
