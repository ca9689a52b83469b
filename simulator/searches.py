"""The searches of `place` in processes of their own, as many at once as there are cores, with a progress bar.

Each child is the same command for one split alone; it prints one row of JSON. Splits of the highest bound come first.
One whose bound is below what another of its kind serves is not searched, and says why.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence

from baton.node.errors import SettingsError
from baton.simulator.bounds import Bound
from baton.simulator.placement import Split
from baton.simulator.report import GOODPUT, Row

BAR = 24
POLL_S = 0.2


class Searches:
    """One search a split. `argv` is the user's; `first_rate` 0: that of each split's bound."""

    def __init__(
        self, argv: Sequence[str], bounds: Sequence[tuple[Split, Bound]], first_rate: float, jobs: int
    ) -> None:
        self.skipped: list[str] = []
        """Why some were not searched."""
        self._argv, self._first_rate, self._jobs = list(argv), first_rate, jobs
        self._waiting = sorted(bounds, key=lambda each: -each[1].rate)
        self._rows: dict[Split, Row] = {}
        self._running: dict[Split, subprocess.Popen[str]] = {}
        self._began_at = time.monotonic()
        self._shown = -1

    def run(self) -> list[Row]:
        """The rows, the best first. Raises SettingsError where a search fails."""
        try:
            while self._waiting or self._running:
                while self._waiting and len(self._running) < self._jobs:
                    self._begin(*self._waiting.pop(0))
                self._show()
                time.sleep(POLL_S)
                for split in [split for split, child in self._running.items() if child.poll() is not None]:
                    self._take(split, self._running.pop(split))
        finally:
            for child in self._running.values():
                child.kill()
            self._show()
            if sys.stderr.isatty():
                print(file=sys.stderr)
        return sorted(self._rows.values(), key=lambda row: -float(row[GOODPUT]))

    def _begin(self, split: Split, bound: Bound) -> None:
        if bound.rate <= self._best(split.kind):
            self.skipped.append(f"{split.name}: at most {bound.rate:.3g} requests/s: {bound.reason}")
            return
        first_rate = self._first_rate or self._best()
        more = ("--only", split.name, "--json", *(("--first-rate", f"{first_rate:g}") if first_rate else ()))
        command = (sys.executable, "-P", "-m", "baton.simulator", "place", *self._argv, *more)
        self._running[split] = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def _best(self, kind: str = "") -> float:
        return max((float(row[GOODPUT]) for each, row in self._rows.items() if kind in ("", each.kind)), default=0.0)

    def _take(self, split: Split, child: subprocess.Popen[str]) -> None:
        printed, _ = child.communicate()
        if child.returncode:
            raise SettingsError(f"the search of {split.name} ended with status {child.returncode}")
        self._rows[split] = json.loads(printed)

    def _show(self) -> None:
        """A bar that moves; where there is no terminal, a line as soon as another split is settled."""
        done, draws = len(self._rows) + len(self.skipped), sys.stderr.isatty()
        if not draws and done == self._shown:
            return
        self._shown = done
        total = done + len(self._running) + len(self._waiting)
        filled = BAR * done // total if total else BAR
        best = max(self._rows.values(), key=lambda row: float(row[GOODPUT]), default=None)
        text = f"; best: {best['split']}, {float(best[GOODPUT]):.4g} requests/s" if best else ""
        bar = "#" * filled + "-" * (BAR - filled)
        seconds = time.monotonic() - self._began_at
        line = f"[{bar}] {done} of {total} splits, {seconds:.0f} s{text}"
        print(f"\r{line}" if draws else line, end="" if draws else "\n", file=sys.stderr, flush=True)
