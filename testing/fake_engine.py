"""An engine without workers: it replays a script step by step, so that a test controls the order of events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from baton.node.messages.control import SamplingSpec
from baton.proxy.interface import Delta, Generation, WorkerStatus
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.adapter_places import RequestAdapter
from baton.proxy.scaling.objectives import RoleScale


@dataclass(frozen=True, slots=True)
class EngineCall:
    """The arguments of one call of `generate`."""

    generation: Generation
    timeout_s: float

    @property
    def request_id(self) -> str:
        return self.generation.request_id

    @property
    def prompt_ids(self) -> tuple[int, ...]:
        return self.generation.prompt_ids

    @property
    def sampling(self) -> SamplingSpec:
        return self.generation.sampling


ScriptStep = Delta | list[Delta] | Exception | asyncio.Event
EngineScript = Callable[[EngineCall], list[ScriptStep]]


@dataclass(slots=True)
class FakeEngine:
    """Replays, for each call, what `script` returns: deltas are yielded, those of a list together, exceptions raised,
    events waited for."""

    script: EngineScript
    not_ready: str = ""
    model_len: int = 2048
    workers: list[WorkerStatus] = field(default_factory=list)
    totals: dict[str, float] = field(default_factory=dict)
    attempts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By model and revision."""
    scaling: dict[str, list[RoleScale]] = field(default_factory=dict)
    adapters: list[RequestAdapter] = field(default_factory=list)
    """Those that were loaded."""
    adapter_failure: Exception | None = None
    """What loading another one raises."""
    calls: list[EngineCall] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancelled: list[str] = field(default_factory=list)
    """Request ids whose generator was closed, or whose task was cancelled, before its script's end."""
    on_cancel: Callable[[str], None] = lambda _: None

    async def generate(
        self, generation: Generation, timeline: Timeline, *, timeout_s: float
    ) -> AsyncGenerator[list[Delta], None]:
        request_id = generation.request_id
        call = EngineCall(generation, timeout_s)
        self.calls.append(call)
        self.running.add(request_id)
        try:
            for step in self.script(call):
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step if isinstance(step, list) else [step]
        except (GeneratorExit, asyncio.CancelledError):
            self.cancelled.append(request_id)
            self.on_cancel(request_id)
            raise
        finally:
            self.running.discard(request_id)

    def ready(self) -> str:
        return self.not_ready

    async def load_adapter(self, model: str, adapter: RequestAdapter, *, timeout_s: float) -> None:
        if self.adapter_failure is not None:
            raise self.adapter_failure
        self.adapters.append(adapter)

    def max_model_len(self, model: str) -> int:
        return self.model_len

    def worker_loads(self) -> list[WorkerStatus]:
        return list(self.workers)

    def dispatched(self) -> Mapping[str, Mapping[str, int]]:
        return self.attempts

    def scales(self) -> Mapping[str, Sequence[RoleScale]]:
        return self.scaling

    def counters(self) -> Mapping[str, float]:
        return dict(self.totals)
