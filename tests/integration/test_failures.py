"""Workers and proxies that die, freeze or leave, and clients that disconnect: streams go on or end in one clear error.

Every stream that goes on is compared with a run of the same request without a fault (made afterwards, since its prefix
would be cached otherwise), and after every test no worker may hold a block. Each worker checks its block accounting as
it exits; its exit status shows the result.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.tests.integration.cluster import Cluster, Stream
from baton.tests.integration.prompts import BEGINNINGS

GREEDY: dict[str, Any] = {"max_tokens": 60, "ignore_eos": True}
SEEDED: dict[str, Any] = {**GREEDY, "temperature": 0.8, "seed": 7, "bad_words": ["little", "He was", "to the"]}
"""A word that an attempt began must not be ended by the next."""

_turn = itertools.count()


def new_prompt(sentences: int = 4) -> str:
    """A prompt that is in no cache, of about 12 tokens a sentence."""
    turn = next(_turn)
    lines = [BEGINNINGS[(turn + n) % len(BEGINNINGS)] for n in range(sentences)]
    return f"Story number {turn}. " + " ".join(lines)


def mixed(count: int, sentences: int = 4) -> list[tuple[str, dict[str, Any]]]:
    """Requests of different prompts, alternately greedy and seeded."""
    return [(new_prompt(sentences), SEEDED | {"seed": n} if n % 2 else GREEDY) for n in range(count)]


def lasting(count: int) -> list[tuple[str, dict[str, Any]]]:
    """As `mixed`, streams of three seconds at least, so that a fault meets them however slow the machine is."""
    return [(prompt, body | {"max_tokens": 150}) for prompt, body in mixed(count)]


def begin(cluster: Cluster, requests: list[tuple[str, dict[str, Any]]]) -> list[Stream]:
    return [cluster.begin(prompt, **body) for prompt, body in requests]


def demand_undisturbed(cluster: Cluster, requests: list[tuple[str, dict[str, Any]]], streams: list[Stream]) -> None:
    """Check that every stream is complete, with the text of a run without faults."""
    for stream in streams:
        stream.join()
        assert stream.broken is None and stream.error is None, (stream.broken, stream.error)
        assert stream.finish == "length"
    again = begin(cluster, requests)
    assert [stream.text for stream in streams] == [stream.join().text for stream in again]


def wait_reserved(cluster: Cluster) -> str:
    """The decode worker that reports waiting work: a reservation whose KV has not arrived."""
    return wait_report(cluster, "waiting", "d")


def wait_busy(cluster: Cluster, role: str) -> str:
    """A worker of a role ("p" or "d") that reports running work."""
    return wait_report(cluster, "running", role)


def wait_report(cluster: Cluster, number: str, role: str) -> str:
    """The first worker of a role whose metric is above 0."""
    found: list[str] = []

    def look() -> bool:
        found[:] = [name for name, value in cluster.worker_values(number).items() if value and name.startswith(role)]
        return bool(found)

    cluster.wait_until(look, f"{number} on a worker {role}*")
    return found[0]


def wait_chunks(cluster: Cluster, streams: list[Stream], count: int) -> None:
    cluster.wait_until(lambda: all(s.num_chunks >= count or s.ended for s in streams), f"{count} chunks a stream")


class Leaver:
    """A client that closes its connection in the middle of a stream."""

    def __init__(self, cluster: Cluster, prompt: str, body: dict[str, Any], max_tokens: int = 1500) -> None:
        own = {"model": "demo", "prompt": prompt, "stream": True}
        payload = json.dumps({**own, **body, "max_tokens": max_tokens}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Length: {len(payload)}\r\n\r\n"
        self._socket = socket.create_connection(("127.0.0.1", cluster.nodes.port), timeout=60)
        self._socket.sendall(head.encode() + payload)

    def wait(self, events: int) -> bytes:
        """Wait until this many events have arrived, or all there is; what arrived."""
        seen = b""
        while seen.count(b"data: ") < events and (received := self._socket.recv(65536)):
            seen += received
        return seen

    def leave(self) -> None:
        self._socket.close()


@pytest.fixture(scope="class")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One cluster for the tests of a class, of `size` workers a role.

    Paced workers make each phase of a request last on any machine: prefill takes at least 10 ms for two tokens (60 ms
    a sentence), decode 20 ms for one. A worker's load report is at most 250 ms old.
    """
    cluster = Cluster(
        request.cls.size,
        request.cls.size,
        proxy_args=("--local-prefill", "never", *request.cls.proxy_args),
        prefill_args=("--max-chunk-tokens", "2"),
        decode_args=request.cls.decode_args,
        prefill_step_s=0.01,
        decode_step_s=0.02,
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    with cluster:
        yield cluster


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The shared cluster, complete at the start, idle and without a leak at the end."""
    shared.nodes.revive()
    yield shared
    if "proxy" in shared.nodes.running():
        shared.wait_idle()


class TestTwoOfEachRole:
    """Faults with a second worker of the role: no client notices them. Steps verify drafts where text repeats."""

    size = 2
    proxy_args = ("--drain-s", "60")
    decode_args = ("--speculate", "ngram")

    def test_prefill_killed_while_computing(self, cluster: Cluster) -> None:
        """Guards against a decode reservation that is held forever for a dead prefill worker."""
        requests = mixed(1, sentences=40)
        streams = begin(cluster, requests)
        cluster.nodes.kill(wait_busy(cluster, "p"))
        assert streams[0].num_chunks == 0
        demand_undisturbed(cluster, requests, streams)

    def test_prefill_killed_with_streams_in_every_phase(self, cluster: Cluster) -> None:
        """Guards eight streams that are before, in and past the transfer from the dead worker."""
        requests = [request for pair in zip(mixed(4, 2), mixed(4, 30), strict=True) for request in pair]
        streams = begin(cluster, requests)
        wait_busy(cluster, "p")
        cluster.wait_until(lambda: any(s.num_chunks > 1 for s in streams), "a stream that decodes")
        assert any(not s.num_chunks for s in streams)
        cluster.nodes.kill(wait_busy(cluster, "p"))
        demand_undisturbed(cluster, requests, streams)

    def test_prefill_killed_before_decode_accepts_the_kv(self, cluster: Cluster) -> None:
        """Guards the transfer: everything is offered and nothing accepted when the sender dies."""
        requests = mixed(1, sentences=12)
        streams = begin(cluster, requests)
        prefill, decode = wait_busy(cluster, "p"), wait_reserved(cluster)
        cluster.nodes.signal(decode, signal.SIGSTOP)
        wait_chunks(cluster, streams, 1)  # the first token comes from prefill
        cluster.nodes.kill(prefill)
        cluster.nodes.signal(decode, signal.SIGCONT)
        demand_undisturbed(cluster, requests, streams)

    def test_prefill_killed_after_the_transfer(self, cluster: Cluster) -> None:
        """Guards against retries of streams that no longer need the dead worker."""
        requests = mixed(2)
        streams = begin(cluster, requests)
        wait_chunks(cluster, streams, 4)
        retries = cluster.retries()
        cluster.nodes.kill("prefill-0")
        demand_undisturbed(cluster, requests, streams)
        assert cluster.retries() == retries

    def test_decode_killed_mid_stream(self, cluster: Cluster) -> None:
        """Guards the new attempt: it continues after the accepted tokens; none is lost, doubled or sampled again."""
        requests = lasting(2)[1:]
        streams = begin(cluster, requests)
        wait_chunks(cluster, streams, 5)
        retries = cluster.counter("retries")
        cluster.nodes.kill(wait_busy(cluster, "d"))
        demand_undisturbed(cluster, requests, streams)
        assert cluster.counter("retries") > retries

    def test_decode_killed_with_drafts_in_flight(self, cluster: Cluster) -> None:
        """Guards against drafts that were not verified in what the new attempt continues: the tokens are those of steps
        without drafts."""
        requests = [(f"{prompt} {prompt}", body | {"max_tokens": 120}) for prompt, body in mixed(8)]
        before = cluster.worker_values("spec_decode_num_drafts_total")
        streams = begin(cluster, requests)
        killed = wait_busy(cluster, "d")
        cluster.wait_until(
            lambda: cluster.worker_values("spec_decode_num_drafts_total")[killed] > before[killed] + 2, "drafts"
        )
        retries = cluster.counter("retries")
        cluster.nodes.kill(killed)
        demand_undisturbed(cluster, [(prompt, body | {"speculative": False}) for prompt, body in requests], streams)
        assert cluster.counter("retries") > retries

    def test_frozen_decode_worker(self, cluster: Cluster) -> None:
        """Guards against a frozen worker: it is detected and replaced, and joins again when it resumes."""
        requests = lasting(2)
        streams = begin(cluster, requests)
        wait_chunks(cluster, streams, 5)
        frozen = wait_busy(cluster, "d")
        cluster.nodes.signal(frozen, signal.SIGSTOP)
        cluster.wait_until(lambda: frozen not in cluster.worker_values("running"), "the frozen worker is noticed")
        demand_undisturbed(cluster, requests, streams)
        cluster.nodes.signal(frozen, signal.SIGCONT)
        cluster.wait_workers("prefill-0", "prefill-1", "decode-0", "decode-1")
        steps = cluster.worker_values("steps_total")[frozen]
        requests = mixed(4)
        demand_undisturbed(cluster, requests, begin(cluster, requests))
        cluster.wait_until(lambda: cluster.worker_values("steps_total")[frozen] > steps, "it serves again")

    def test_frozen_prefill_worker(self, cluster: Cluster) -> None:
        """Guards against stale KV: data that the resumed worker still sends matches no transfer."""
        requests = mixed(1, sentences=40)
        streams = begin(cluster, requests)
        frozen = wait_busy(cluster, "p")
        cluster.nodes.signal(frozen, signal.SIGSTOP)
        wait_chunks(cluster, streams, 2)
        cluster.nodes.signal(frozen, signal.SIGCONT)
        demand_undisturbed(cluster, requests, streams)
        cluster.wait_workers("prefill-0", "prefill-1", "decode-0", "decode-1")

    def test_frozen_proxy(self, cluster: Cluster) -> None:
        """Guards both leases: workers have dropped the proxy when it resumes with its old state."""
        requests = mixed(4)
        streams = begin(cluster, requests)
        wait_chunks(cluster, streams, 3)
        lost = {
            name: cluster.nodes.log(name).count("proxy_lost")
            for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")
        }
        cluster.nodes.signal("proxy", signal.SIGSTOP)
        try:
            cluster.wait_until(
                lambda: all(cluster.nodes.log(name).count("proxy_lost") > lost[name] for name in lost),
                "workers notice a frozen proxy",
            )
        finally:
            cluster.nodes.signal("proxy", signal.SIGCONT)
        demand_undisturbed(cluster, requests, streams)
        cluster.wait_workers("prefill-0", "prefill-1", "decode-0", "decode-1")

    def test_worker_drains(self, cluster: Cluster) -> None:
        """Guards SIGTERM: running requests finish on the worker, new ones go elsewhere, the exit status is 0."""
        requests = lasting(2)
        streams = begin(cluster, requests)
        wait_chunks(cluster, streams, 3)
        retries = cluster.retries()
        leaving = wait_busy(cluster, "d")
        for name in (leaving, "prefill-0"):
            cluster.nodes.signal(name, signal.SIGTERM)
        later = mixed(2)
        demand_undisturbed(cluster, later, begin(cluster, later))
        for name in (leaving, "prefill-0"):
            assert cluster.wait_end(name) == 0
        demand_undisturbed(cluster, requests, streams)
        assert cluster.retries() == retries

    def test_proxy_killed_and_restarted(self, cluster: Cluster) -> None:
        """Guards against orphaned requests: workers drop those of a restarted proxy and register again."""
        streams = begin(cluster, mixed(4, sentences=8))
        wait_chunks(cluster, streams[:1], 1)
        cluster.nodes.kill("proxy")
        assert all(stream.join().broken or stream.finish for stream in streams)
        cluster.nodes.revive()
        cluster.wait_idle()
        requests = mixed(2)
        demand_undisturbed(cluster, requests, begin(cluster, requests))

    def test_proxy_drains(self, cluster: Cluster) -> None:
        """Guards SIGTERM to the proxy: running streams complete, the exit status is 0."""
        requests = mixed(2)
        streams = begin(cluster, requests)
        wait_chunks(cluster, streams, 3)
        cluster.nodes.signal("proxy", signal.SIGTERM)
        for stream in streams:
            assert stream.join().finish == "length"
        assert cluster.wait_end("proxy") == 0
        cluster.nodes.revive()
        demand_undisturbed(cluster, requests, streams)


class TestOneOfEachRole:
    """Faults without a second worker: one clear error, and service again as soon as a worker joins."""

    size = 1
    proxy_args = ("--drain-s", "1")
    decode_args = ("--max-num-seqs", "2")

    @pytest.mark.parametrize(("name", "role"), [("decode-0", "decode"), ("prefill-0", "prefill")])
    def test_the_only_worker_killed(self, cluster: Cluster, name: str, role: str) -> None:
        """Guards clients against waiting forever: an error event in a stream, a status before it starts."""
        waits = role == "prefill"
        streams = begin(cluster, mixed(2, sentences=40 if waits else 2))
        if waits:
            wait_busy(cluster, "p")
        else:
            wait_chunks(cluster, streams, 3)
        cluster.nodes.kill(name)
        for stream in streams:
            stream.join()
            assert not stream.finish
            if waits:
                assert "503" in str(stream.broken) or "service_unavailable" in str(stream.broken), stream.broken
            else:
                assert stream.error is not None and stream.error["code"] == "service_unavailable", stream.broken
        answer = httpx.post(f"{cluster.url}/v1/completions", json={"model": "demo", "prompt": "Hello"}, timeout=60)
        assert answer.status_code == 503 and answer.json()["error"]["type"] == "server_error", answer.text
        assert httpx.get(f"{cluster.url}/ready", timeout=60).status_code == 503
        cluster.nodes.start_node(name)
        cluster.nodes.wait_ready(2)
        requests = mixed(2)
        demand_undisturbed(cluster, requests, begin(cluster, requests))

    def test_client_disconnects_in_each_phase(self, cluster: Cluster) -> None:
        """Guards against work and blocks held by either leg of a request whose client has disconnected."""
        before = sum(cluster.worker_values("generated_tokens_total").values())
        running = [Leaver(cluster, *request) for request in mixed(2, 1)]  # all rows of decode are taken
        for leaver in running:
            assert leaver.wait(3).startswith(b"HTTP/1.1 200 ")
        waiting = Leaver(cluster, *mixed(1)[0])
        cluster.wait_until(lambda: cluster.queued() == 1, "a request that waits")
        waiting.leave()
        cluster.wait_until(lambda: cluster.queued() == 0, "an empty queue")
        wait_busy(cluster, "d")
        for leaver in running:
            leaver.leave()  # while it decodes
        cluster.wait_idle()
        computing = Leaver(cluster, *mixed(1, 40)[0], max_tokens=200)
        wait_busy(cluster, "p")
        computing.leave()
        cluster.wait_idle()
        steps = cluster.worker_values("steps_total")["prefill-0"]
        moving = Leaver(cluster, *mixed(1, 12)[0], max_tokens=200)  # 75 steps of prefill
        wait_reserved(cluster)
        cluster.wait_until(
            lambda: cluster.worker_values("steps_total")["prefill-0"] > steps + 60, "most of the prefill"
        )
        cluster.nodes.signal("decode-0", signal.SIGSTOP)  # for less than the two seconds after which it counts as dead
        try:
            begun = moving.wait(1)
            assert begun.startswith(b"HTTP/1.1 200 ") or b"no decode worker" in begun  # on a machine slower than that
            moving.leave()
        finally:
            cluster.nodes.signal("decode-0", signal.SIGCONT)
        cluster.wait_workers("prefill-0", "decode-0")
        cluster.wait_idle()
        made = sum(cluster.worker_values("generated_tokens_total").values()) - before
        assert made < 1500, f"{made} tokens were made for clients that had gone"

    def test_a_worker_started_later_joins(self, cluster: Cluster) -> None:
        """Guards growth: a worker that joins a busy cluster gets requests without a restart of any node."""
        cluster.nodes.add_worker("decode", "decode-1")
        cluster.wait_workers("prefill-0", "decode-0", "decode-1")
        requests = mixed(4)  # two rows a worker: both workers are needed
        demand_undisturbed(cluster, requests, begin(cluster, requests))
        assert cluster.worker_values("steps_total")["decode-1"] > 0
        cluster.nodes.signal("decode-1", signal.SIGTERM)
        assert cluster.wait_end("decode-1") == 0
        cluster.nodes.forget("decode-1")

    def test_the_drain_time_of_the_proxy_ends(self, cluster: Cluster) -> None:
        """Guards the end of the drain time: open requests fail, their legs are cancelled, the exit status is 0."""
        body = {"max_tokens": 1500, "ignore_eos": True}
        streams = [cluster.begin(new_prompt(1), **body) for _ in range(2)]
        wait_chunks(cluster, streams, 3)
        waiting = cluster.begin(new_prompt(1), **body)  # decode has two rows
        cluster.wait_until(lambda: cluster.queued() == 1, "a request that waits")
        cluster.nodes.signal("proxy", signal.SIGTERM)
        for stream in streams:
            assert stream.join().error is not None and stream.error["code"] == "service_unavailable", stream.broken
        assert "503" in str(waiting.join().broken) or "shutting down" in str(waiting.broken), waiting.broken
        assert cluster.wait_end("proxy") == 0
        assert "Traceback" not in cluster.nodes.log("proxy")


@pytest.mark.parametrize("frozen", ["proxy", "decode-0"])
def test_a_process_is_frozen_until_its_peers_hang_up(frozen: str, tmp_path: Path) -> None:
    """Guards reconnecting: the awake process still holds the connections that its peers have replaced meanwhile, and
    ignored the new ones for ever."""
    with Cluster(store_args=(), log_folder=tmp_path) as cluster:
        before = cluster.complete("The old king", max_tokens=8)["choices"]
        assert not cluster.peers_hung_up(frozen)
        cluster.nodes.signal(frozen, signal.SIGSTOP)
        try:
            cluster.wait_until(lambda: cluster.peers_hung_up(frozen), "its peers hang up")
        finally:
            cluster.nodes.signal(frozen, signal.SIGCONT)
        cluster.wait_until(lambda: serves(cluster), "it serves again")
        cluster.wait_workers("prefill-0", "decode-0")
        cluster.wait_until(lambda: cluster.store_value("workers") == 2, "the store is a member, with both workers")
        assert cluster.complete("The old king", max_tokens=8)["choices"] == before


def serves(cluster: Cluster) -> bool:
    """Whether a request that both roles take part in is answered."""
    try:
        return bool(cluster.complete(new_prompt(), max_tokens=8))
    except AssertionError:
        return False
