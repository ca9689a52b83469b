"""Streamed tokens a second, and a second of the proxies' CPU time, of one proxy and of several at one port; beside
them, how long /health and /metrics take.

The worker has no model and makes more tokens than proxies can stream; clients only count events. All share the cores
of this machine, so tokens a second say little where proxies, worker and clients need more cores than there are: tokens
a CPU second say what a proxy takes, and whether several cost more than one. Runs are in turns.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import busy_s, cpu_s, machine_text, peak_memory_mb
from baton.benchmark.harness.statistics import percentile
from baton.benchmark.load.table import markdown
from baton.launch.cluster import Cluster
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec

WARM_UP_S = 1.0
START_S = 0.002
"""For a stream to begin."""


@dataclass(slots=True)
class Clients:
    """Clients of one port, each with one stream at a time; they count the events that they read."""

    port: int
    request: bytes
    num_events: int = 0
    running: bool = True
    failures: list[str] = field(default_factory=list)

    async def stream(self) -> None:
        """One stream after another, each over a connection of its own."""
        while self.running:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(self.request)
            first = await reader.read(1 << 16)
            if not first.startswith(b"HTTP/1.1 200"):
                self.failures.append(first[:80].decode(errors="replace"))
                return
            self.num_events += first.count(b"data: ")
            while (data := await reader.read(1 << 16)) and self.running:
                self.num_events += data.count(b"data: ")
            writer.close()


@dataclass(slots=True)
class Probe:
    """Asks for one page again and again, over a connection each."""

    port: int
    path: str
    pause_s: float
    took_ms: list[float] = field(default_factory=list)

    async def run(self) -> None:
        """Until it is cancelled. The time includes that for which this process was busy with streams."""
        request = f"GET {self.path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
        while True:
            began = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            writer.write(request)
            await reader.read()
            self.took_ms.append(1e3 * (time.perf_counter() - began))
            writer.close()
            await asyncio.sleep(self.pause_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run; `proxies_cpu_s` by proxy."""

    tokens: int
    took_s: float
    proxies_cpu_s: tuple[float, ...]
    worker_cpu_s: float
    clients_cpu_s: float
    busy_cores: float
    """Of the machine, by whatever runs on it."""
    peak_memory_mb: float
    health_p99_ms: float
    metrics_p99_ms: float

    @property
    def tokens_s(self) -> float:
        return self.tokens / self.took_s

    @property
    def tokens_cpu_s(self) -> float:
        return self.tokens / sum(self.proxies_cpu_s)


async def measure(clients: Clients, num_streams: int, seconds: float, pids: Sequence[int], worker: int) -> Measured:
    """`pids` of the proxies."""
    tasks = [asyncio.create_task(clients.stream()) for _ in range(num_streams)]
    await asyncio.sleep(WARM_UP_S + num_streams * START_S)
    probes = Probe(clients.port, "/health", 0.02), Probe(clients.port, "/metrics", 1.0)
    probing = [asyncio.create_task(probe.run()) for probe in probes]
    before, events = _spent_s([*pids, worker]), clients.num_events
    await asyncio.sleep(seconds)
    used = [after - spent for after, spent in zip(_spent_s([*pids, worker]), before, strict=True)]
    tokens, clients.running = clients.num_events - events, False
    for task in probing:
        task.cancel()
    await asyncio.gather(*tasks)
    if clients.failures:
        raise SystemExit(f"a request failed: {clients.failures[0]}")
    took_s, busy, own, *proxies, of_worker = used
    health, metrics = (percentile(probe.took_ms, 99) for probe in probes)
    peak_mb = max(map(peak_memory_mb, pids))
    return Measured(tokens, took_s, tuple(proxies), of_worker, own, busy / took_s, peak_mb, health, metrics)


def _spent_s(pids: Sequence[int]) -> list[float]:
    """The time by now; then CPU time of the machine, of this process, and of each of `pids`."""
    return [time.perf_counter(), busy_s(), time.process_time(), *(cpu_s([pid]) for pid in pids)]


def run(num_proxies: int, num_streams: int, max_tokens: int, step_s: float, seconds: float) -> Measured:
    """A cluster of so many proxies and one worker that has no model."""

    def edit(spec: ChildSpec) -> ChildSpec:
        if spec.group != "decode":
            return spec
        at, secret_at = spec.argv.index("--proxy"), spec.argv.index("--secret-file")
        proxies, secret = spec.argv[at : at + 1 + num_proxies], spec.argv[secret_at : secret_at + 2]
        command = (*spec.argv[:3], "baton.testing.token_worker", *proxies, *secret, "--step-s", str(step_s))
        return replace(spec, argv=command)

    settings = ServeSettings(device="cpu", prefill=0, proxies=num_proxies, store_ram_gib=0.0, start_timeout_s=120.0)
    body = {"model": "demo", "prompt": list(range(300, 332)), "max_tokens": max_tokens, "stream": True}
    content = msgspec.json.encode({**body, "ignore_eos": True})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    with Cluster(settings, edit=edit) as cluster:
        pids = [cluster.pid(name) for name in cluster.names() if name.startswith("proxy")]
        clients = Clients(cluster.port, head.encode() + content)
        return asyncio.run(measure(clients, num_streams, seconds, pids, cluster.pid("decode-0")))


def main(argv: Sequence[str]) -> int:
    parser = new_parser("proxies", __doc__)
    parser.add_argument("--proxies", type=int, nargs="+", default=[1, 2], help="numbers of proxies, in turns")
    parser.add_argument("--streams", type=int, default=128, help="streams at once")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens of a stream")
    parser.add_argument("--step-s", type=float, default=0.002, help="time from one token of a stream to the next")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of a run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each number of proxies")
    options = parser.parse_args(argv)
    exit_on_sigterm()
    lines = JsonLines(options.output)
    lines.begin(argv)
    found: dict[int, list[Measured]] = {count: [] for count in options.proxies}
    for round_number in range(options.rounds):
        for count in options.proxies if round_number % 2 == 0 else reversed(options.proxies):
            measured = run(count, options.streams, options.max_tokens, options.step_s, options.seconds)
            found[count].append(measured)
            lines.put(
                "proxies",
                proxies=count,
                tokens_s=measured.tokens_s,
                tokens_cpu_s=measured.tokens_cpu_s,
                cpu_s=measured.proxies_cpu_s,
                worker_cpu_s=measured.worker_cpu_s,
                clients_cpu_s=measured.clients_cpu_s,
                busy_cores=measured.busy_cores,
                peak_memory_mb=measured.peak_memory_mb,
                health_p99_ms=measured.health_p99_ms,
                metrics_p99_ms=measured.metrics_p99_ms,
            )
    rows = [[str(count), *_medians(runs)] for count, runs in found.items()]
    header = (
        "proxies",
        "tokens/s",
        "tokens a CPU second of the proxies",
        "cores used by them",
        "peak memory of one, MB",
        "/health p99, ms",
        "/metrics p99, ms",
    )
    print(markdown(header, rows))
    print(f"{options.streams} streams of {options.max_tokens} tokens, medians of {options.rounds}; {machine_text()}")
    return 0


def _medians(runs: Sequence[Measured]) -> list[str]:
    def median(values: list[float]) -> float:
        return percentile(values, 50)

    return [
        f"{median([each.tokens_s for each in runs]):,.0f}",
        f"{median([each.tokens_cpu_s for each in runs]):,.0f}",
        f"{median([sum(each.proxies_cpu_s) / each.took_s for each in runs]):.2f}",
        f"{median([each.peak_memory_mb for each in runs]):.0f}",
        f"{median([each.health_p99_ms for each in runs]):.0f}",
        f"{median([each.metrics_p99_ms for each in runs]):.0f}",
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
