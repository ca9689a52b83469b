"""What a transfer costs the decode steps beside it: two GPUs, decode steps on the first, KV coming in from the second.

A transfer is the KV of a prompt of 2048 tokens of an 8B model: 256 MiB in chunks of 64 MiB, all under way at once, each
verified by its digest, received by a thread of the decoding process, as in a worker. `cost_ms` is the time
by which a run of steps gets longer, for each of its transfers: the median over pairs of runs, with and without. One
JSON line a plane on standard output.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Sequence

from baton.benchmark.gpu.decode import DecodeBatch
from baton.benchmark.gpu.planes import NAMES, TIMEOUT_S, PlaneEnd, blocks_of, connect, receive, start_sender
from baton.benchmark.gpu.runners import BLOCK_TOKENS, load_shape, make_runner, random_pool
from baton.benchmark.harness.json_lines import JsonLines
from baton.benchmark.harness.options import new_parser
from baton.benchmark.harness.processes import MeasuringChild
from baton.models.cuda.limits import StepLimits
from baton.models.cuda.runner import CudaRunner
from baton.worker.build_cuda import POLL_S
from baton.worker.main import SWITCH_S

CHUNK_MIB, CHUNKS = 64, 4
STEPS, EVERY, PAIRS = 160, 16, 4


class TransferThread:
    """Receives one transfer for each call of `begin`."""

    def __init__(self, end: PlaneEnd, child: MeasuringChild) -> None:
        self.took: list[float] = []
        self._end, self._child = end, child
        self._wanted = threading.Semaphore(0)
        self._ended = threading.Semaphore(0)
        self._row = 1 << 20
        threading.Thread(target=self._run, name="transfers", daemon=True).start()

    def begin(self) -> None:
        self._wanted.release()

    def finish(self, count: int) -> None:
        """Wait for so many that were begun."""
        for _ in range(count):
            assert self._ended.acquire(timeout=TIMEOUT_S), f"a transfer took more than {TIMEOUT_S} s"

    def _run(self) -> None:
        while True:
            self._wanted.acquire()
            self._row += 1
            began_at = time.perf_counter()
            receive(self._end, self._row, CHUNK_MIB, CHUNKS, CHUNKS, self._child)
            for number in range(CHUNKS):
                self._end.pool.digest(blocks_of(number, CHUNK_MIB))
            self.took.append(time.perf_counter() - began_at)
            self._ended.release()


def run(runner: CudaRunner, batch: DecodeBatch, transfers: TransferThread | None) -> float:
    """Seconds of STEPS steps, one under way while the next is launched, with a transfer every so many."""
    launched, count = [], 0
    began_at = time.perf_counter()
    for step in range(STEPS):
        if transfers is not None and step % EVERY == EVERY // 2:
            transfers.begin()
            count += 1
        launched.append(runner.launch(batch.rows()))
        if len(launched) > runner.run_ahead:
            launched.pop(0).read()
    for each in launched:
        each.read()
    took = time.perf_counter() - began_at
    if transfers is not None:
        transfers.finish(count)
    return took


def main(argv: Sequence[str]) -> int:
    parser = new_parser("transfer-cost", __doc__)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a folder of benchmark/shapes")
    parser.add_argument("--rows", type=int, default=32, help="sequences that decode")
    parser.add_argument("--context", type=int, default=2048, help="tokens of each")
    parser.add_argument("--planes", nargs="+", default=["cuda_ipc", "nccl:8", "nccl:16", "nccl:32"], help="nccl:CTAS")
    options = parser.parse_args(argv)
    lines = JsonLines(options.output)
    sys.setswitchinterval(SWITCH_S)
    with start_sender("1") as child:
        end = PlaneEnd("0", NAMES[1])
        end.poll_interval_s = POLL_S
        config, weights = load_shape(lines, options.shape)
        pool = random_pool(config, options.rows * (options.context // BLOCK_TOKENS + 1) + 8)
        runner = make_runner(lines, config, weights, StepLimits(options.rows, 2048), pool, options.context + 1)
        for plane in options.planes:
            kind, _, ctas = plane.partition(":")
            connect(end, child, kind, int(ctas or 0))
            measure(runner, TransferThread(end, child), pool.num_blocks, plane, options, lines)
        assert end.plane is not None
        end.plane.close()
        child.close()
    return 0


def measure(
    runner: CudaRunner,
    transfers: TransferThread,
    num_blocks: int,
    plane: str,
    options: argparse.Namespace,
    lines: JsonLines,
) -> None:
    """The line of one plane."""
    for _ in range(3):  # opens what is opened at the first use
        transfers.begin()
        transfers.finish(1)
    alone = statistics.median(transfers.took[1:])
    transfers.took.clear()
    costs, steps = [], []
    for _ in range(PAIRS):
        batches = [DecodeBatch([options.context] * options.rows, num_blocks, STEPS) for _ in range(2)]
        without, beside = run(runner, batches[0], None), run(runner, batches[1], transfers)
        costs.append((beside - without) * EVERY / STEPS)
        steps.append(without / STEPS)
    lines.put(
        "transfer_cost",
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
