"""Which faults a run has, from its seed alone: nodes are killed or frozen, links stall, break, delay and damage.

Pure. An event is one fault, or two at once. What carries it out is faults.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from baton.testing.relay import FaultKind, LinkFault, Toward

KILL, FREEZE, PARTITION = "kill", "freeze", "partition"
KINDS = (KILL, FREEZE, PARTITION, *(kind.value for kind in FaultKind if kind is not FaultKind.REFUSE))
FREEZES_S = (0.3, 1.0, 2.0, 3.0, 7.0, 8.0, 15.0)
STALLS_S = (0.5, 2.0, 5.0, 8.0)
LINK_KINDS = ("proxy-prefill", "proxy-decode", "prefill-decode", "data", "worker-store", "proxy-store")
TWO_AT_ONCE = 0.25
"""The share of events with two faults."""
ALL_LINKS = 0.3
"""The share of link faults that meet every link of the kind; the others meet one."""
_AMOUNTS = {
    FaultKind.DELAY: (0.05, 0.2, 0.5),
    FaultKind.CUT: (100, 5_000, 100_000),
    FaultKind.FLIP: (0.01, 0.05, 0.2),
    FaultKind.REPEAT: (0.01, 0.05, 0.2),
}


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """One fault. `target`: a node, or a kind of link, of which `which` (a number from 0 to 1) chooses one."""

    kind: str
    target: str
    lasts_s: float
    link: LinkFault | None = None
    """None: a fault of a node."""
    which: float | None = None
    """None: every link of the kind."""

    @property
    def text(self) -> str:
        toward = f" toward the {self.link.toward}" if self.link and self.link.toward is not Toward.BOTH else ""
        links = "every " if self.link and self.which is None else ""
        return f"{self.kind} {links}{self.target}{toward} {self.lasts_s:g} s".replace(" 0 s", "")


def plan(
    seed: int, count: int, nodes: Sequence[str], kinds: Sequence[str], longest_s: float
) -> list[tuple[PlannedFault, ...]]:
    """`count` faults in events of one or two. Kinds take turns, in random order, so that each comes as often."""
    draw = random.Random(seed)
    faults: list[PlannedFault] = []
    while len(faults) < count:
        for kind in draw.sample(list(kinds), len(kinds)):
            faults.append(_fault(draw, kind, nodes, longest_s))
    del faults[count:]
    events: list[tuple[PlannedFault, ...]] = []
    while faults:
        size = 2 if len(faults) > 1 and draw.random() < TWO_AT_ONCE and faults[0].target != faults[1].target else 1
        events.append(tuple(faults[:size]))
        del faults[:size]
    return events


def _fault(draw: random.Random, kind: str, nodes: Sequence[str], longest_s: float) -> PlannedFault:
    if kind == KILL:
        return PlannedFault(kind, draw.choice(nodes), 0.0)
    if kind == FREEZE:
        return PlannedFault(kind, draw.choice(nodes), min(draw.choice(FREEZES_S), longest_s))
    partition = kind == PARTITION
    link_kind = FaultKind.STALL if partition else FaultKind(kind)
    toward = draw.choice((Toward.TARGET, Toward.DIALER)) if partition else Toward.BOTH
    lasts_s = 0.0 if link_kind is FaultKind.RESET else min(draw.choice(STALLS_S), longest_s)
    amount = draw.choice(_AMOUNTS.get(link_kind, (0.0,)))
    which = None if draw.random() < ALL_LINKS else draw.random()
    return PlannedFault(kind, draw.choice(LINK_KINDS), lasts_s, LinkFault(link_kind, toward, amount), which)
