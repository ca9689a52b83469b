"""A rolling restart: workers and a proxy are drained and replaced while clients stream, and no request breaks."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from baton.tests.integration.cluster import Cluster, Stream
from baton.tests.integration.test_failures import GREEDY, SEEDED, begin, demand_undisturbed, mixed, new_prompt

NODES = ("prefill-0", "decode-0", "proxy-0", "prefill-1", "decode-1")
CLIENTS = 3
Request = tuple[str, dict[str, Any]]


class Load:
    """Clients that stream one request after the other; each request has a prompt that no cache holds."""

    def __init__(self, cluster: Cluster) -> None:
        self.requests: list[Request] = []
        self.streams: list[Stream] = []
        self._cluster = cluster
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CLIENTS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Let the running streams end."""
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def served(self) -> int:
        return sum(stream.finish != "" for stream in list(self.streams))

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number = len(self.requests)
                request = new_prompt(), SEEDED | {"seed": number} if number % 2 else GREEDY
                self.requests.append(request)
                self.streams.append(self._cluster.begin(request[0], **request[1]))
            stream = self.streams[number].join()
            if isinstance(stream.broken, httpx.TransportError) and not stream.num_chunks:
                # A proxy that stops listening resets connections that it has not accepted yet.
                self.streams[number] = self._cluster.begin(request[0], **request[1]).join()


@contextmanager
def under_load(cluster: Cluster) -> Iterator[Load]:
    """Inside it clients stream; at its end each of their streams must be complete, with the text of a run without
    faults."""
    load = Load(cluster)
    load.start()
    cluster.wait_until(lambda: load.served() >= CLIENTS, "the first streams are served")
    yield load
    load.stop()
    demand_undisturbed(cluster, load.requests, load.streams)
    cluster.wait_idle()


def replace(cluster: Cluster, load: Load, name: str) -> None:
    """Drain a node, start its successor, and let the cluster serve with it."""
    cluster.nodes.signal(name, signal.SIGTERM)
    assert cluster.wait_end(name) == 0
    cluster.nodes.start_node(name)
    cluster.nodes.wait_ready()
    served = load.served()
    cluster.wait_until(lambda: load.served() > served, f"a stream beside the new {name}")
    assert "Traceback" not in cluster.nodes.log(name)


def test_no_request_breaks_when_workers_and_a_proxy_are_replaced_in_turn(tmp_path: Path) -> None:
    """Guards a rolling upgrade: a worker ends with its last sequence and its last transfer, a proxy with its last
    stream, and neither gets anything new."""
    with Cluster(2, 2, proxies=2, decode_step_s=0.02, log_folder=tmp_path) as cluster, under_load(cluster) as load:
        for name in NODES:
            replace(cluster, load, name)
        assert cluster.retries() == 0


def test_no_request_breaks_when_one_revision_replaces_another(tmp_path: Path) -> None:
    """Guards an update to workers whose KV does not fit that of the old ones: each pair is of one revision."""
    cluster = Cluster(2, 2, worker_args=("--revision", "old"), decode_step_s=0.02, log_folder=tmp_path)
    with cluster, under_load(cluster):
        pairs: set[tuple[str, str]] = set()
        for number in range(2):
            begin_new_pair(cluster, number)
            pairs |= pairs_of(cluster)
            for name in (f"prefill-{number}", f"decode-{number}"):
                cluster.nodes.signal(name, signal.SIGTERM)
                assert cluster.wait_end(name) == 0
                cluster.nodes.forget(name)
        assert pairs and {("new" in prefill) == ("new" in decode) for prefill, decode in pairs} == {True}
        assert {"new" in decode for _, decode in pairs} == {True, False}
        assert cluster.retries() == 0


def begin_new_pair(cluster: Cluster, number: int) -> None:
    """Start a prefill and a decode worker of the new revision, and let it serve beside the old one."""
    for role in ("prefill", "decode"):
        cluster.nodes.add_worker(role, f"{role}-new-{number}", "--revision", "new", "--block-tokens", "32")
    served = attempts(cluster, "new")
    cluster.wait_until(lambda: attempts(cluster, "new") > served + 3, "the new workers serve")


def attempts(cluster: Cluster, revision: str) -> float:
    """How many went to a revision."""
    lines = [line for line in cluster.metrics() if line.startswith("baton:revision_requests_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'revision="{revision}"' in line)


def pairs_of(cluster: Cluster) -> set[tuple[str, str]]:
    """Prefill and decode workers between which KV has moved, of those that are there."""
    found = [
        re.match(r'baton:transfer_bytes_total\{decode="(.+)",prefill="(.+)"\}', each) for each in cluster.metrics()
    ]
    return {(match[2], match[1]) for match in found if match}


def test_a_draining_prefill_worker_stays_until_its_kv_was_fetched(tmp_path: Path) -> None:
    """Guards KV that nothing computes any more, and that decode has not got: the worker is its only owner."""
    cut_off = tmp_path / "cut-off"
    with Cluster(2, 1, cut_off_file=cut_off, log_folder=tmp_path) as cluster:
        warm = mixed(4)
        demand_undisturbed(cluster, warm, begin(cluster, warm))
        cut_off.touch()
        requests = mixed(2)
        streams = begin(cluster, requests)
        cluster.wait_until(lambda: all(stream.num_chunks for stream in streams), "first tokens, which prefill draws")
        leaving = ("prefill-0", "prefill-1")
        for name in leaving:
            cluster.nodes.signal(name, signal.SIGTERM)
        cluster.wait_until(lambda: all("draining" in cluster.nodes.log(name) for name in leaving), "they drain")
        assert all(stream.num_chunks == 1 for stream in streams) and set(leaving) < set(cluster.nodes.running())
        cut_off.unlink()
        assert [stream.join().finish for stream in streams] == ["length", "length"]
        assert [cluster.wait_end(name) for name in leaving] == [0, 0]
        assert cluster.retries() == 0
        cluster.nodes.revive()
        demand_undisturbed(cluster, requests, streams)
