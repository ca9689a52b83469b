"""How fast this client is by itself: streams from the null server, a process of its own, and what each token costs.

Two loads. Flat out, many streams as fast as both sides can: the rate that one core of client sustains. Paced, tokens
that come one by one as from a real server: what share of a core is gone at that rate, and how late requests were sent.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass

from baton.benchmark.load.meter import StreamMeter
from baton.node.http_client import HttpClient, Origin

TARGET_TOKENS_PER_S = 20_000
NUM_STREAMS = 64
START_TIMEOUT_S = 30.0
RUN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Speed:
    tokens: int
    reads: int
    """Reads from sockets that brought tokens: at one a token the client pays the full price."""
    wall_s: float
    cpu_s: float

    @property
    def tokens_per_core_s(self) -> float:
        return self.tokens / self.cpu_s

    def __str__(self) -> str:
        return (
            f"{self.tokens / self.wall_s:,.0f} tokens/s; {self.tokens_per_core_s:,.0f} tokens a CPU second; "
            f"{self.cpu_s / self.wall_s:.2f} cores used; {self.tokens / self.reads:.2f} tokens a read"
        )


async def measure(origin: Origin, num_streams: int, tokens_a_stream: int) -> Speed:
    """All streams at once, to their ends. Raises RuntimeError where a token is missing."""
    with closing(HttpClient(origin, {}, time.perf_counter)) as http:
        body = b'{"model":"null","prompt":[1],"max_tokens":%d,"stream":true}' % tokens_a_stream
        request = http.request("POST", "/v1/completions", body)
        begun_s, cpu_s = time.perf_counter(), time.process_time()
        async with asyncio.timeout(RUN_TIMEOUT_S), asyncio.TaskGroup() as tasks:
            reads = [tasks.create_task(_stream(http, request, tokens_a_stream)) for _ in range(num_streams)]
        wall_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
    return Speed(num_streams * tokens_a_stream, sum(task.result() for task in reads), wall_s, cpu_s)


async def run() -> int:
    """Prints both loads; 1 where one core does not reach the target."""
    async with _null_server(0.0) as origin:
        flat_out = await measure(origin, NUM_STREAMS, 4000)
    async with _null_server(3.0) as origin:
        paced = await measure(origin, NUM_STREAMS, 1000)
    print(f"flat out, {NUM_STREAMS} streams: {flat_out}")
    print(f"paced, {NUM_STREAMS} streams, a token every 3 ms: {paced}")
    reached = min(flat_out.tokens_per_core_s, paced.tokens_per_core_s) >= TARGET_TOKENS_PER_S
    print(f"{'reached' if reached else 'MISSED'}: {TARGET_TOKENS_PER_S:,} tokens/s on one core")
    return 0 if reached else 1


async def _stream(http: HttpClient, request: bytes, tokens: int) -> int:
    meter, reads = StreamMeter(), set[float]()

    def sink(data: bytes, now_s: float) -> bool:
        reads.add(now_s)
        meter.feed(data, now_s)
        return True

    await http.exchange(request, sink)
    if meter.num_chunks != tokens or meter.error:
        raise RuntimeError(f"{meter.num_chunks} of {tokens} tokens arrived {meter.error}")
    return len(reads)


@asynccontextmanager
async def _null_server(gap_ms: float) -> AsyncIterator[Origin]:
    """One in a process of its own, so that it does not count as the client."""
    command = (sys.executable, "-P", "-m", "baton.benchmark", "null-server", "--gap-ms", str(gap_ms))
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        if not line.startswith("ready "):
            raise RuntimeError("the null server did not start")
        yield Origin.parse(line.split()[1])
    finally:
        process.kill()
        await process.wait()
