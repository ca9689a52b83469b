"""One or many runs: against which server, at which rate, with which seed, in which order; each becomes a `Run`.

It owns the order (servers take turns, and alternate in going first), the preparation of a run and the measurement of
the client's own CPU time. `planner` makes the plan of a run, `runner` sends it, `summary` computes its figures.
"""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TextIO

from baton.benchmark.load.bodies import BodyStyle, BodyWriter
from baton.benchmark.load.client import OpenAIClient, find_model
from baton.benchmark.load.plan import Plan
from baton.benchmark.load.planner import Inputs, make_plan
from baton.benchmark.load.progress import ProgressBar
from baton.benchmark.load.prompts import WORDS, RandomParts, words_of
from baton.benchmark.load.record import Record
from baton.benchmark.load.runner import LoadRunner, NoWatch, RealClock, Watch
from baton.benchmark.load.search import RateSearch
from baton.benchmark.load.settings import ServingSettings
from baton.benchmark.load.summary import Summary, summarize
from baton.node.http_client import HttpClient, Origin

READY_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    """In tables; empty where there is but one."""
    origin: Origin
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run and its results."""

    server: Server
    rate: float | None
    """As `settings.rates` has it."""
    seed: int
    offered_rate: float | None
    """What the schedule comes to; None where all were due at once."""
    num_requests: int
    num_warmups: int
    warmup_errors: tuple[str, ...]
    client_cpu_cores: float
    """CPU time of this client divided by the run's duration: near 1 it measures itself."""
    machine_load: float
    """Load average of this machine over the last minute of the run: server, client and others."""
    summary: Summary
    records: tuple[Record, ...]


def in_turns(
    servers: Sequence[Server], rates: Sequence[float | None], seeds: Sequence[int]
) -> Iterator[tuple[Server, float | None, int]]:
    """Every server at every rate with every seed; servers take turns, and alternate in going first.

    A seed is a round over all rates, so that a passing disturbance of the machine meets a rate once, not in all seeds.
    """
    for number, (rate, seed) in enumerate((rate, seed) for seed in seeds for rate in rates):
        for server in servers if number % 2 == 0 else reversed(servers):
            yield server, rate, seed


class Experiment:
    """All runs of one command. The prompts of a run follow from `salt` and the number of the run against its server."""

    def __init__(self, settings: ServingSettings, inputs: Inputs, salt: int, terminal: TextIO | None) -> None:
        self._settings = settings
        self._inputs = inputs
        self._salt = salt
        self._terminal = terminal
        self._words = words_of(settings.tokenizer) if settings.tokenizer else WORDS
        self._num_runs: Counter[Origin] = Counter()

    async def find_servers(self) -> list[Server]:
        """Those of the settings, with their models; raises SettingsError where one does not answer."""
        texts = self._settings.compare or (self._settings.base_url,)
        servers = [self._server(text) for text in texts]
        if len({server.name for server in servers}) < len(servers):  # the same twice: how far do two equals differ?
            servers = [replace(server, name=f"{server.name}#{n}") for n, server in enumerate(servers, 1)]
        given = self._settings.model or ("",)
        wanted = given * len(servers) if len(given) == 1 else given
        found = []
        for server, name in zip(servers, wanted, strict=True):
            with closing(self._http(server.origin)) as http:
                found.append(replace(server, model=await find_model(http, name, READY_TIMEOUT_S)))
        return found

    async def run_all(self, servers: Sequence[Server], on_run: Callable[[Run], None]) -> None:
        """Every rate and seed of the settings."""
        for server, rate, seed in in_turns(servers, self._settings.rates, self._settings.seed):
            on_run(await self.run(server, rate, seed))

    async def find_rate(self, server: Server, on_run: Callable[[Run], None]) -> float | None:
        """The highest rate that meets the objectives, within a tenth; None if there is none."""
        rates = self._settings.rates
        search = RateSearch(rates[0] if rates[0] and self._settings.request_rate else 1.0)
        while (rate := search.next_rate()) is not None:
            runs = [await self.run(server, rate, seed) for seed in self._settings.seed]
            for run in runs:
                on_run(run)
            attained = sum(run.summary.attainment for run in runs) / len(runs)
            search.observe(rate, attained >= self._settings.attainment)
        return search.found

    async def run(self, server: Server, rate: float | None, seed: int) -> Run:
        settings = self._settings
        plan = make_plan(settings, self._inputs, rate, seed)
        style, writer = self._writer(server, plan)
        with closing(OpenAIClient(self._http(server.origin), writer, style, settings.request_timeout_s)) as client:
            watch = self._watch(server, rate, plan.num_requests)
            runner = LoadRunner(plan, client, RealClock(), settings.max_concurrency, watch)
            warmup_errors = await runner.warm_up()
            others_froze = gc.get_freeze_count() > 0
            gc.collect()
            gc.freeze()  # no collection of what exists now while the clock runs
            begun_s, cpu_s = time.perf_counter(), time.process_time()
            log = await runner.run()
            cores = (time.process_time() - cpu_s) / (time.perf_counter() - begun_s)
            if not others_froze:
                gc.unfreeze()  # which is all or nothing
            watch.close()
        return Run(
            server=server,
            rate=rate,
            seed=seed,
            offered_rate=plan.offered_rate,
            num_requests=plan.num_requests,
            num_warmups=len(plan.warmups),
            warmup_errors=tuple(warmup_errors),
            client_cpu_cores=cores,
            machine_load=os.getloadavg()[0],
            summary=summarize(log.records, log.duration_s, log.num_unsent, settings.objectives, settings.percentiles),
            records=log.records,
        )

    def _server(self, text: str) -> Server:
        name, separator, url = text.partition("=")
        named = separator and "://" not in name
        origin = Origin.parse(url if named else text)
        shown = name if named else str(origin).partition("://")[2]
        return Server(shown if self._settings.compare else "", origin, "")

    def _http(self, origin: Origin) -> HttpClient:
        headers = {"Authorization": f"Bearer {self._settings.api_key}"} if self._settings.api_key else {}
        return HttpClient(origin, headers, time.perf_counter)

    def _writer(self, server: Server, plan: Plan) -> tuple[BodyStyle, BodyWriter]:
        settings = self._settings
        style = BodyStyle(
            model=server.model,
            chat=settings.chat,
            as_ids=settings.as_ids,
            temperature=settings.temperature,
            ignore_eos=settings.ignore_eos,
            include_usage=settings.include_usage,
            extra=settings.extra_fields,
        )
        # One number of both: no two runs against a server share a prompt, but two servers are asked the same.
        salt = (self._salt << 16) + self._num_runs[server.origin]
        self._num_runs[server.origin] += 1
        writer = BodyWriter(style, RandomParts(salt, settings.vocab_size, self._words))
        for conversation in plan.conversations:
            for turn in conversation.turns:
                writer.check(turn, in_conversation=len(conversation.turns) > 1)
        return style, writer

    def _watch(self, server: Server, rate: float | None, total: int) -> Watch:
        if self._terminal is None:
            return NoWatch()
        name = " ".join(filter(None, (server.name, "" if rate is None else f"{rate:g} req/s")))
        return ProgressBar(self._terminal, name, total)
