"""What a transfer costs the decode steps beside it: two GPUs, decode steps on the first, KV coming in from the second.

A transfer is the KV of a prompt of 2048 tokens of an 8B model: 256 MiB in chunks of 64 MiB, all under way at once, each
verified by its digest, received by a thread of the decoding process, as a worker's carrier does. `cost_ms` is the time
by which a run of steps gets longer, for each of its transfers: the median over pairs of runs, with and without. One
JSON line a plane on standard output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time

from baton.benchmark.gpu.decode import Cell
from baton.benchmark.gpu.gpu import BLOCK_TOKENS, line, load_shape, make_runner, random_pool
from baton.benchmark.gpu.planes import NAMES, PATIENCE_S, Child, Side, blocks_of, receive
from baton.models.cuda.runner import CudaRunner, Limits
from baton.worker.build_cuda import SOON_S
from baton.worker.main import SWITCH_S

CHUNK_MIB, CHUNKS = 64, 4
STEPS, EVERY, PAIRS = 160, 16, 4


class Transfers:
    """A thread that receives one transfer each time it is told to."""

    def __init__(self, side: Side, child: Child) -> None:
        self.took: list[float] = []
        self._side, self._child = side, child
        self._wanted = threading.Semaphore(0)
        self._ended = threading.Semaphore(0)
        self._row = 1 << 20
        threading.Thread(target=self._run, name="transfers", daemon=True).start()

    def begin(self) -> None:
        self._wanted.release()

    def finish(self, count: int) -> None:
        """Wait for so many that were begun."""
        for _ in range(count):
            assert self._ended.acquire(timeout=PATIENCE_S), "a transfer does not end"

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            self._row += 1
            began_at = time.perf_counter()
            receive(self._side, self._row, CHUNK_MIB, CHUNKS, CHUNKS, self._child)
            for number in range(CHUNKS):
                self._side.pool.digest(blocks_of(number, CHUNK_MIB))
            self.took.append(time.perf_counter() - began_at)
            self._ended.release()


def run(runner: CudaRunner, cell: Cell, transfers: Transfers | None) -> float:
    """Seconds of STEPS steps, one under way while the next is launched, with a transfer every so many."""
    flights, count = [], 0
    began_at = time.perf_counter()
    for step in range(STEPS):
        if transfers is not None and step % EVERY == EVERY // 2:
            transfers.begin()
            count += 1
        flights.append(runner.launch(cell.rows()))
        if len(flights) > runner.run_ahead:
            flights.pop(0).read()
    for flight in flights:
        flight.read()
    took = time.perf_counter() - began_at
    if transfers is not None:
        transfers.finish(count)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--planes", nargs="+", default=["cuda_ipc", "nccl:8", "nccl:16", "nccl:32"], help="nccl:CTAS")
    options = parser.parse_args()
    sys.setswitchinterval(SWITCH_S)
    child, side = Child("1"), Side("0", NAMES[1])
    side.nap_s = SOON_S
    config, weights = load_shape(options.shape)
    pool = random_pool(config, options.rows * (options.context // BLOCK_TOKENS + 1) + 8)
    runner = make_runner(config, weights, Limits(options.rows, 2048), pool, options.context + 1)
    for plane in options.planes:
        kind, _, ctas = plane.partition(":")
        address, own = child.ask("make", kind, int(ctas or 0)), side.make(kind, int(ctas or 0))
        side.connect(NAMES[0], address)
        child.ask("connect", NAMES[1], own)
        transfers = Transfers(side, child)
        for _ in range(3):  # opens what is opened at the first use
            transfers.begin()
            transfers.finish(1)
        alone = statistics.median(transfers.took[1:])
        transfers.took.clear()
        costs, steps = [], []
        for _ in range(PAIRS):
            cells = [Cell([options.context] * options.rows, len(pool), STEPS) for _ in range(2)]
            without, beside = run(runner, cells[0], None), run(runner, cells[1], transfers)
            costs.append((beside - without) * EVERY / STEPS)
            steps.append(without / STEPS)
        line(
            what="transfer_cost",
            plane=plane,
            rows=options.rows,
            context=options.context,
            mib=CHUNK_MIB * CHUNKS,
            step_ms=round(statistics.median(steps) * 1e3, 3),
            cost_ms=round(statistics.median(costs) * 1e3, 3),
            costs_ms=[round(cost * 1e3, 3) for cost in costs],
            transfer_alone_ms=round(alone * 1e3, 2),
            transfer_beside_steps_ms=round(statistics.median(transfers.took) * 1e3, 2),
        )
    assert side.plane is not None and child.process.stdin is not None
    side.plane.close()
    child.process.stdin.close()
    child.process.wait(20)


if __name__ == "__main__":
    main()
