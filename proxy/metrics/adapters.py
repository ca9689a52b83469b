"""What is counted of adapters by their names, read at each scrape. Labels are bounded: many names share one at the end.

One that is unloaded goes from here too. Where adapters are, workers report (node.counters).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.proxy.interface import Engine

MAX_SHOWN = 64
"""Adapters with a label of their own: those whose names are there longest."""
OTHERS = "(others)"


@dataclass(slots=True)
class AdapterUsage:
    """Generations of one name."""

    begun: int = 0
    waiting: int = 0
    """Without a first token."""
    running: int = 0


class NamedUsage(Protocol):
    """An adapter under its name."""

    @property
    def name(self) -> str: ...

    @property
    def usage(self) -> AdapterUsage: ...


class AdapterCollector(Collector):
    def __init__(self, engine: Engine, names: Iterable[NamedUsage], unix_time: Callable[[], float] = time.time) -> None:
        self._engine, self._names, self._unix_time = engine, names, unix_time

    def describe(self) -> Iterable[Metric]:
        return ()  # defined so that registering does not collect

    def collect(self) -> Iterable[Metric]:
        named = list(self._names)
        begun = CounterMetricFamily(
            "baton:adapter_generations", "Generations that began with an adapter.", labels=("adapter",)
        )
        for each in named[:MAX_SHOWN]:
            begun.add_metric((each.name,), each.usage.begun)
        if len(named) > MAX_SHOWN:
            begun.add_metric((OTHERS,), sum(each.usage.begun for each in named[MAX_SHOWN:]))
        yield begun
        info = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "When this was read, in Unix time; which adapters have generations with and without a first token.",
            labels=("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        max_loras = max((worker.max_loras for worker in self._engine.worker_loads()), default=0)
        if named:
            running = _list(each.name for each in named if each.usage.running)
            waiting = _list(each.name for each in named if each.usage.waiting)
            info.add_metric((str(max_loras), running, waiting), self._unix_time())
        yield info


def _list(names: Iterable[str]) -> str:
    return ",".join(islice(names, MAX_SHOWN))
