"""Faults against real processes on this machine: what becomes of streams, how long it takes, and what stays behind.

A cluster of the demo model, all of whose links lead through relays, serves streams while a schedule that the seed alone
gives kills and freezes its processes and stalls, delays, cuts, partitions and damages its links, also two at once.
Every stream is compared with the same request to a cluster without faults: greedy and sampled answers must be equal.

A JSON line for each event and a table: streams by what became of them, the time until the proxy notices and until all
serve again, the longest gap, blocks, memory and open files before and after, and the exit statuses of the processes,
which are not 0 where the sum of a worker's blocks is not right. Exit status 1: a stream was wrong, hung or blamed on
its client, a process did not come back, or a block leaked.

With `--device cuda` random weights of `--shape`, and workers of `--deterministic`, as roundings depend on what else is
in a step otherwise. KV goes over `--plane`: past the relays, so that kills and freezes are what meets a transfer.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from baton.benchmark.cluster.fault_report import Event, Footprint, footprint, summary, table
from baton.benchmark.cluster.fault_schedule import FREEZE, KILL, KINDS, PlannedFault, plan
from baton.benchmark.cluster.fault_streams import (
    RIGHT,
    ROUNDED,
    SHORTEST,
    FaultClients,
    StreamRequest,
    StreamResult,
    read_stream,
)
from baton.benchmark.cluster.forks import fork_of, largest
from baton.benchmark.cluster.running import ServedModel, running, served_model
from baton.benchmark.harness.errors import BenchmarkFailed
from baton.benchmark.harness.json_lines import JsonLines, exit_on_sigterm
from baton.benchmark.harness.options import cluster_parser
from baton.launch.cluster import Cluster, ClusterError
from baton.launch.local import ServeSettings
from baton.launch.supervisor import ChildSpec
from baton.testing.relay_board import RelayBoard, RelayedLink

POLL_S = 0.05
NOTICE_WITHIN_S = 10.0
BACK_WITHIN_S = 120.0
IDLE_WITHIN_S = 60.0


def settings_of(
    options: argparse.Namespace, model: ServedModel, prefill: int, decode: int, store_folder: Path
) -> ServeSettings:
    on_gpu = options.device == "cuda"
    has_store = prefill > 0 and not on_gpu
    return ServeSettings(
        model=model.name,
        prefill=prefill,
        decode=decode,
        device=options.device,
        gpus=tuple(options.gpus) if on_gpu else (),
        local_prefill="short" if prefill else None,
        store_ram_gib=0.1 if has_store else 0.0,
        store_disk_gib=0.05 if has_store else 0.0,
        store_path=store_folder,
        proxy_arg=("--local-prefill-tokens", "0"),
        worker_arg=_worker_args(options, model),
        start_timeout_s=options.start_timeout_s,
    )


def _worker_args(options: argparse.Namespace, model: ServedModel) -> tuple[str, ...]:
    plane = options.plane or ("zmq" if options.device == "cpu" else None)
    chosen = ("--plane", plane) if plane else ()
    exact = ("--deterministic",) if options.device == "cuda" else ()
    return (*model.worker_args, *chosen, *exact, "--drain-s", "10", *options.worker_arg)


def in_the_clear(spec: ChildSpec) -> ChildSpec:
    """The same node, without encryption of its links."""
    place = spec.argv.index("--secret-file")
    return replace(spec, argv=(*spec.argv[:place], *spec.argv[place + 2 :], "--insecure-network"))


class FaultRun:
    """One cluster under a schedule of faults."""

    def __init__(self, cluster: Cluster, board: RelayBoard, clients: FaultClients) -> None:
        self._cluster = cluster
        self._board = board
        self._clients = clients
        self._members = cluster.members()
        self._proxies = {name for name in cluster.names() if name.startswith("proxy")}

    def event(self, number: int, faults: Sequence[PlannedFault]) -> Event:
        """Carry out one event, and wait until all serve again."""
        begin_s, hits = time.monotonic(), self._board.num_hits()
        targets = [self._links(fault) for fault in faults]
        ends = [begin_s + fault.lasts_s for fault in faults]
        for fault, links in zip(faults, targets, strict=True):
            self._begin(fault, links)
        notice_s = self._notice_s(faults, begin_s)
        for end_s, fault, links in sorted(zip(ends, faults, targets, strict=True), key=lambda each: each[0]):
            time.sleep(max(0.0, end_s - time.monotonic()))
            self._end(fault, links)
        over_s = time.monotonic()
        back_s = self._back_s(over_s)
        return Event(
            number=number,
            text=" + ".join(fault.text for fault in faults),
            kinds=tuple(fault.kind for fault in faults),
            begin_s=begin_s,
            end_s=time.monotonic(),
            notice_s=notice_s,
            back_s=back_s,
            hits=self._board.num_hits() - hits,
        )

    def repair(self) -> None:
        """Replace what did not come back, so that the run goes on."""
        for name in self._cluster.names():
            self._cluster.kill(name)
        self._cluster.revive()

    # -- inside

    def _links(self, fault: PlannedFault) -> list[RelayedLink]:
        links = self._board.links(fault.target) if fault.link is not None else []
        return links if fault.which is None or not links else [links[int(fault.which * len(links))]]

    def _begin(self, fault: PlannedFault, links: Sequence[RelayedLink]) -> None:
        if fault.kind == KILL:
            self._cluster.kill(fault.target)
        elif fault.kind == FREEZE:
            self._cluster.freeze(fault.target)
        else:
            self._board.set_fault(links, fault.link)

    def _end(self, fault: PlannedFault, links: Sequence[RelayedLink]) -> None:
        if fault.kind == KILL:
            self._cluster.start_node(fault.target)
        elif fault.kind == FREEZE:
            self._cluster.resume(fault.target)
        else:
            self._board.set_fault(links, None)

    def _notice_s(self, faults: Sequence[PlannedFault], begin_s: float) -> float | None:
        """Until the proxy counts a killed or frozen process as gone; None where there is none, or it lasts too short,
        or the proxy itself is concerned."""
        watched = {
            fault.target for fault in faults if fault.kind == KILL or (fault.kind == FREEZE and fault.lasts_s > 2)
        }
        if not watched or any(fault.target in self._proxies for fault in faults):
            return None
        freezes = [begin_s + fault.lasts_s for fault in faults if fault.kind == FREEZE]
        until_s = min([begin_s + NOTICE_WITHIN_S, *freezes])
        while time.monotonic() < until_s:
            if not self._cluster.members() & watched:
                return time.monotonic() - begin_s
            time.sleep(POLL_S)
        return None

    def _back_s(self, over_s: float) -> float | None:
        """Until all are members and a request is answered; None: not in time."""
        while time.monotonic() < over_s + BACK_WITHIN_S:
            if self._members <= self._cluster.members() and self._cluster.get("/health_generate")[0] == 200:
                return time.monotonic() - over_s
            time.sleep(POLL_S)
        return None


def disturbed(
    options: argparse.Namespace, model: ServedModel, lines: JsonLines, folder: Path
) -> tuple[list[Event], list[StreamResult], tuple[Footprint, Footprint]]:
    """The run under faults: its events, its streams, and what its processes held before and after."""
    board = RelayBoard(options.seed)

    def edit(spec: ChildSpec) -> ChildSpec:
        return board.route(in_the_clear(spec) if options.insecure_network else spec)

    try:
        settings = settings_of(options, model, options.prefill, options.decode, folder)
        with running(settings, edit=edit) as (cluster, _):
            clients = FaultClients(lambda request: read_stream(cluster.port, cluster.model, request))
            clients.start(options.clients, options.seed, options.answer_tokens, options.longest)
            time.sleep(options.pause_s)
            before = footprint(cluster)
            events = _events(options, lines, FaultRun(cluster, board, clients), cluster)
            clients.stop()
            board.set_fault(board.links(), None)
            idle = _wait_idle(cluster)
            after = footprint(cluster)
            lines.put("idle", seconds=idle)
            lines.put("exits", not_zero=cluster.stop())
    finally:
        board.close()
    return events, clients.results, (before, after)


def _events(options: argparse.Namespace, lines: JsonLines, run: FaultRun, cluster: Cluster) -> list[Event]:
    nodes = [name for name in cluster.names() if name not in options.spare]
    events: list[Event] = []
    end_s = time.monotonic() + options.duration_s
    for number, faults in enumerate(plan(options.seed, options.faults, nodes, options.kinds, options.longest_s)):
        if time.monotonic() > end_s:
            break
        event = run.event(number, faults)
        events.append(event)
        lines.put("event", fault=event.text, notice_s=event.notice_s, back_s=event.back_s, hits=event.hits)
        if event.back_s is None:
            run.repair()
        time.sleep(options.pause_s)
    return events


def _wait_idle(cluster: Cluster) -> float | None:
    """Seconds until no worker has work and every block is free or cached; None: a block leaked."""
    begin_s = time.monotonic()
    while time.monotonic() < begin_s + IDLE_WITHIN_S:
        if footprint(cluster).is_idle:
            return time.monotonic() - begin_s
        time.sleep(POLL_S)
    return None


def undisturbed(
    options: argparse.Namespace, model: ServedModel, lines: JsonLines, results: Sequence[StreamResult], folder: Path
) -> dict[StreamRequest, str]:
    """The texts of the requests that had begun, from workers that nothing disturbs; what differs is reported."""
    texts = {result.request: "" for result in results}
    todo = [result.request for result in results if result.text]
    workers = 1 if options.device == "cpu" else len(options.gpus)
    with running(settings_of(options, model, 0, workers, folder)) as (cluster, _):

        def work() -> None:
            while todo:
                request = todo.pop()
                result = read_stream(cluster.port, cluster.model, request, options.start_timeout_s)
                texts[request] = result.text

        threads = [threading.Thread(target=work) for _ in range(options.clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if not is_exact(options):
            _report_forks(
                lines, cluster, [each for each in results if each.finished and each.text != texts[each.request]]
            )
    return texts


def _report_forks(lines: JsonLines, cluster: Cluster, results: Sequence[StreamResult]) -> None:
    """Of each whole greedy stream that is not the same as without faults, where it left that one, and how."""
    greedy = [result for result in results if result.is_greedy]
    for result in greedy:
        result.fork = fork_of(result, cluster.url, cluster.model)
        lines.put("fork", place=result.fork.place, pause=result.first_pause, margin=result.fork.margin)
    lines.put("forks", **largest([result.fork for result in greedy if result.fork is not None]))


def is_exact(options: argparse.Namespace) -> bool:
    """Whether a new attempt has the roundings of the first one."""
    return bool(options.device == "cpu")


def main(argv: Sequence[str]) -> int:
    options = _options(argv)
    exit_on_sigterm()
    lines = JsonLines(options.output)
    lines.begin(argv)
    with TemporaryDirectory(prefix="baton-faults-") as folder, served_model(options) as model:
        try:
            events, results, footprints = disturbed(options, model, lines, Path(folder))
            texts = undisturbed(options, model, lines, results, Path(folder) / "oracle")
        except ClusterError as error:
            raise BenchmarkFailed(str(error)) from error
    for result in results:
        verdict = result.verdict(texts[result.request], exact=is_exact(options))
        if verdict not in (RIGHT, ROUNDED):
            lines.put(verdict, error=result.error, end=result.end, gap_s=result.gap_s, status=result.status)
    found = summary(events, results, texts, footprints, exact=is_exact(options))
    lines.put("summary", **found.fields)
    print(table(events, results, texts, footprints, exact=is_exact(options)))
    return 0 if found.holds else 1


def _options(argv: Sequence[str]) -> argparse.Namespace:
    parser = cluster_parser("faults", __doc__)
    parser.set_defaults(device="cpu")
    add = parser.add_argument
    add("--gpus", type=int, nargs="+", default=[0, 1], help="the GPUs, which workers take in turn")
    add(
        "--plane",
        choices=("cuda_ipc", "nccl", "shm", "zmq"),
        help="the only data plane; default: zmq, on GPUs the best",
    )
    add("--seed", type=int, default=0, help="of schedule, prompts and damage")
    add("--faults", type=int, default=60, help="number of faults")
    add("--kinds", nargs="+", default=list(KINDS), choices=KINDS, help="which faults; default: all")
    add("--spare", nargs="+", default=[], metavar="NODE", help="nodes that are neither killed nor frozen")
    add("--prefill", type=int, default=2, help="prefill workers")
    add("--decode", type=int, default=2, help="decode workers")
    add("--clients", type=int, default=6, help="streams at a time")
    add("--answer-tokens", type=int, default=120, help="length of each answer")
    add("--longest", type=int, default=320, help="longest prompt")
    add("--longest-s", type=float, default=15.0, help="longest fault")
    add("--pause-s", type=float, default=2.0, help="from the end of one fault to the next")
    add("--duration-s", type=float, default=3600.0, help="no further fault after this time")
    add("--insecure-network", action="store_true", help="links without encryption: damage reaches the messages")
    options = parser.parse_args(argv)
    if options.longest <= SHORTEST:
        parser.error(f"--longest must be more than {SHORTEST}")
    return options


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
