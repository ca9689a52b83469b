"""Follows the replicas that the proxy asks for: starts and drains this machine's workers, between two bounds a role.

`changes` is pure; `follow` looks every LOOK_S. The law with its windows and rates is the proxy's.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.launch.supervisor import ChildSpec, Say

LOOK_S = 2.0
_DESIRED = re.compile(r'^baton:desired_replicas\{(?:[^}]*,)?role="(\w+)"[^}]*\} ([\d.]+)$', re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Fewest and most workers of a role."""

    least: int
    most: int


class Workers(Protocol):
    """What `follow` needs of the supervisor."""

    def names(self) -> set[str]:
        """Of the children that run, those that drain included."""

    def add(self, spec: ChildSpec) -> None: ...

    def retire(self, name: str) -> None: ...


def desired_replicas(page: str) -> dict[str, int]:
    """By role, out of a page of metrics: the most of all models and proxies."""
    found: dict[str, int] = {}
    for role, value in _DESIRED.findall(page):
        found[role] = max(found.get(role, 0), int(float(value)))
    return found


def changes(
    desired: Mapping[str, int], specs: Sequence[ChildSpec], running: set[str], retired: set[str], bounds: Bounds
) -> tuple[list[ChildSpec], list[str]]:
    """Workers to start and names of those to drain; `specs` are all that there may be, the first to start first.

    A worker that drains is started again only when it has ended."""
    start: list[ChildSpec] = []
    drain: list[str] = []
    for role in sorted({spec.group for spec in specs} & set(desired)):
        own = [spec for spec in specs if spec.group == role]
        serving = [spec for spec in own if spec.name in running - retired]
        missing = min(bounds.most, max(bounds.least, desired[role])) - len(serving)
        start += [spec for spec in own if spec.name not in running][: max(0, missing)]
        drain += [spec.name for spec in serving[::-1]][: max(0, -missing)]
    return start, drain


async def follow(
    read_metrics: Callable[[], Awaitable[str]], workers: Workers, specs: Sequence[ChildSpec], bounds: Bounds, say: Say
) -> None:
    """Until it is cancelled."""
    retired: set[str] = set()
    while True:
        await asyncio.sleep(LOOK_S)
        desired = desired_replicas(await read_metrics())
        running = workers.names()
        retired &= running
        start, drain = changes(desired, specs, running, retired, bounds)
        for spec in start:
            say(f"autoscale: starting {spec.name}")
            workers.add(spec)
        for name in drain:
            say(f"autoscale: draining {name}")
            retired.add(name)
            workers.retire(name)
