"""What a run under faults found: sums of streams by fault, times, and what its processes held before and after."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.benchmark.cluster.fault_streams import BLAMED, HUNG, RIGHT, VERDICTS, WRONG, StreamRequest, StreamResult
from baton.benchmark.cluster.metrics import MetricsPage
from baton.benchmark.load.table import markdown
from baton.launch.cluster import Cluster

WORK = ("running", "waiting")


@dataclass(frozen=True, slots=True)
class Event:
    """One fault, or two at once. Times of `begin_s` and `end_s` are those of time.monotonic."""

    number: int
    text: str
    kinds: tuple[str, ...]
    begin_s: float
    end_s: float
    notice_s: float | None
    """Until the proxy noticed, where that can be seen."""
    back_s: float | None
    """From the end of the fault until all served again; None: not in time."""
    hits: int
    """Pieces that were changed on a link."""

    def meets(self, result: StreamResult) -> bool:
        return result.began_s < self.end_s and result.ended_s > self.begin_s


@dataclass(frozen=True, slots=True)
class Footprint:
    """What processes hold: blocks that are neither free nor cached, memory in MB of 10**6 bytes, open files."""

    held_blocks: float
    work: float
    """Requests that run or wait, as the workers report it."""
    memory_mb: Mapping[str, float]
    open_files: Mapping[str, int]

    @property
    def is_idle(self) -> bool:
        return self.held_blocks == 0 and self.work == 0


def footprint(cluster: Cluster) -> Footprint:
    page = MetricsPage(cluster.get("/metrics")[1])
    total, free = (page.total(f"baton:worker_{name}_blocks") for name in ("total", "free"))
    pids = {name: cluster.pid(name) for name in cluster.running()}
    return Footprint(
        held_blocks=total - free if total else float("nan"),
        work=sum(page.total(f"baton:worker_{name}") for name in WORK),
        memory_mb={name: _memory_mb(pid) for name, pid in pids.items()},
        open_files={name: len(os.listdir(f"/proc/{pid}/fd")) for name, pid in pids.items()},
    )


def _memory_mb(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@dataclass(frozen=True, slots=True)
class FaultSummary:
    """Of a whole run."""

    fields: Mapping[str, object]
    holds: bool
    """No stream was wrong, hung or blamed on its client, all came back, and no block is held."""


def summary(
    events: Sequence[Event],
    results: Sequence[StreamResult],
    texts: Mapping[StreamRequest, str],
    footprints: tuple[Footprint, Footprint],
    *,
    exact: bool = True,
) -> FaultSummary:
    verdicts = Counter(result.verdict(texts[result.request], exact=exact) for result in results)
    before, after = footprints
    away = [event.text for event in events if event.back_s is None]
    fields: dict[str, object] = {
        "events": len(events),
        "faults": sum(len(event.kinds) for event in events),
        "streams": len(results),
        **{name: verdicts[name] for name in VERDICTS},
        "longest_gap_s": max((r.gap_s for r in results if r.verdict(texts[r.request]) == RIGHT), default=0.0),
        "notice_s": max((event.notice_s for event in events if event.notice_s is not None), default=None),
        "back_s": max((event.back_s for event in events if event.back_s is not None), default=None),
        "did_not_come_back": away,
        "held_blocks": after.held_blocks,
        "memory_mb": {name: (before.memory_mb.get(name), after.memory_mb[name]) for name in after.memory_mb},
        "open_files": {name: (before.open_files.get(name), after.open_files[name]) for name in after.open_files},
    }
    bad = verdicts[WRONG] + verdicts[HUNG] + verdicts[BLAMED]
    return FaultSummary(fields, not bad and not away and after.is_idle)


def table(
    events: Sequence[Event],
    results: Sequence[StreamResult],
    texts: Mapping[StreamRequest, str],
    footprints: tuple[Footprint, Footprint],
    *,
    exact: bool = True,
) -> str:
    """By kind of fault (a stream counts for each event that it met), then by process."""
    head = ["fault", "events", *VERDICTS, "longest gap s", "noticed s", "back s"]
    rows: list[list[str]] = []
    for kind in sorted({kind for event in events for kind in event.kinds}):
        of_kind = [event for event in events if kind in event.kinds]
        met = [result for result in results if any(event.meets(result) for event in of_kind)]
        verdicts = Counter(result.verdict(texts[result.request], exact=exact) for result in met)
        gaps = [result.gap_s for result in met if result.verdict(texts[result.request]) == RIGHT]
        times = [_longest(event.notice_s for event in of_kind), _longest(event.back_s for event in of_kind)]
        counts = [str(verdicts[name]) for name in VERDICTS]
        rows.append([kind, str(len(of_kind)), *counts, f"{max(gaps, default=0.0):.1f}", *times])
    before, after = footprints
    held_head = ["process", "MB before", "MB after", "files before", "files after"]
    held: list[list[str]] = []
    for name in after.memory_mb:
        memory = [f"{each.memory_mb.get(name, 0.0):.0f}" for each in footprints]
        held.append([name, *memory, str(before.open_files.get(name, 0)), str(after.open_files[name])])
    return f"{markdown(head, rows)}\n\n{markdown(held_head, held)}"


def _longest(times: Iterable[float | None]) -> str:
    known = [each for each in times if each is not None]
    return f"{max(known):.1f}" if known else "-"
