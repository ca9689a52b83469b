"""Two proxies at one port over the same workers: both serve, the death of one ends its own streams and no others."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.launch.local import free_port
from baton.tests.integration.cluster import NO_TLS, ROOT, Cluster, Stream
from baton.tests.integration.prompts import BEGINNINGS

MAX_CONNECTIONS = 64
"""The kernel chooses a proxy for each connection by its hash: so many never reach only one of two."""
LONG: dict[str, Any] = {"max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """One worker of each role, paced, so that streams last until a fault is there."""
    options, logs = ("--local-prefill", "never", "--debug-requests", "500"), tmp_path_factory.mktemp("logs")
    with Cluster(1, 1, proxies=2, proxy_args=options, decode_step_s=0.02, log_folder=logs) as made:
        yield made


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    """The shared cluster, complete at the start, without work or a leak at the end."""
    shared.nodes.revive()
    yield shared
    shared.wait_idle()


def by_proxy(cluster: Cluster, name: str) -> dict[str, float]:
    """A metric of each proxy that answers, summed over its other labels; from one scrape of the shared port."""
    values: dict[str, float] = {}
    for line in cluster.metrics():
        if found := re.fullmatch(re.escape(name) + r'\{.*proxy="(\d)"\} (\S+)', line):
            values[found[1]] = values.get(found[1], 0.0) + float(found[2])
    return values


def begin_on_both(cluster: Cluster, at_least: int) -> list[Stream]:
    """Streams of which each proxy has `at_least` so many."""
    streams: list[Stream] = []
    before = by_proxy(cluster, "baton:requests_total")
    while len(streams) < MAX_CONNECTIONS:
        streams.append(cluster.begin(BEGINNINGS[len(streams) % len(BEGINNINGS)], **LONG))
        if len(streams) >= 2 * at_least:
            cluster.wait_until(lambda: all(s.num_chunks or s.ended for s in streams), "all streams have begun")
            now = by_proxy(cluster, "baton:requests_total")
            if min(now[proxy] - before[proxy] for proxy in "01") >= at_least:
                return streams
    raise AssertionError("all connections reach one proxy")


def test_requests_reach_both_proxies_and_are_counted(cluster: Cluster) -> None:
    """Guards against a proxy that idles behind the other, and a scrape that shows only what one of them counts."""
    before = by_proxy(cluster, "vllm:request_success_total")
    ids = [cluster.complete(f"Number {number}", max_tokens=4)["id"] for number in range(MAX_CONNECTIONS)]
    counts = by_proxy(cluster, "vllm:request_success_total")
    served = {proxy: counts[proxy] - before[proxy] for proxy in counts}
    assert set(served) == {"0", "1"} and min(served.values()) > 0
    assert sum(served.values()) == MAX_CONNECTIONS
    assert cluster.num_workers() == 2, "workers are shown once"
    for request_id in ids:
        found = httpx.get(f"{cluster.url}/debug/requests/{request_id}", timeout=60, verify=NO_TLS)
        assert found.status_code == 200 and found.json()["id"] == request_id


def test_a_killed_proxy_ends_its_own_streams_only(cluster: Cluster) -> None:
    """Guards the streams of the other proxy, and the workers, which must drop what the dead one has left."""
    undisturbed = [cluster.begin(prompt, **LONG) for prompt in BEGINNINGS]
    texts = [stream.join().text for stream in undisturbed]
    streams = begin_on_both(cluster, 3)
    lost = by_proxy(cluster, "baton:worker_lost_total")["0"]
    cluster.nodes.kill("proxy-1")
    broken = [stream for stream in streams if stream.join().broken is not None]
    assert broken and len(broken) < len(streams)
    for stream in broken:
        assert cluster.nodes.get(f"/debug/requests/{stream.id}", "proxy-0")[0] == 404, "the other proxy's stream"
    for number, stream in enumerate(streams):
        if stream.broken is None:
            assert stream.finish == "length" and stream.text == texts[number % len(texts)]
    assert cluster.complete("Still here", max_tokens=4)["choices"]
    assert by_proxy(cluster, "baton:worker_lost_total") == {"0": lost}
    assert by_proxy(cluster, "baton:proxy_up") == {"0": 1.0, "1": 0.0}

    cluster.nodes.revive()
    cluster.wait_idle()
    again = begin_on_both(cluster, 1)
    assert all(stream.join().finish == "length" for stream in again)
    assert by_proxy(cluster, "vllm:request_success_total")["1"] > 0


def test_a_proxy_drains_while_the_other_serves(cluster: Cluster) -> None:
    """Guards a rolling restart: running streams end, and what is new goes to the proxy that stays."""
    streams = begin_on_both(cluster, 2)
    cluster.nodes.signal("proxy-0", signal.SIGTERM)
    assert all(stream.join().finish == "length" and stream.broken is None for stream in streams)
    assert cluster.wait_end("proxy-0") == 0
    for number in range(8):
        assert cluster.complete(f"Number {number}", max_tokens=4)["choices"]


def test_serve_brings_a_killed_proxy_back() -> None:
    """Guards `serve`: it starts again a proxy that died, and the others and the workers go on meanwhile."""
    port = free_port()
    command = [sys.executable, "-P", "-m", "baton.launch.serve", "--port", str(port), "--device", "cpu"]
    command += ["--proxies", "2", "--prefill", "0", "--store-ram-gib", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as serve:
        try:
            assert serve.stdout is not None
            lines = iter(serve.stdout.readline, "")
            assert any(line.startswith("ready ") for line in lines)
            (proxy_1,) = [pid for pid in children(serve.pid) if b"--proxy-index\x001\x00" in command_line(pid)]
            body = {"model": "demo", "prompt": "Hello", "max_tokens": 4}
            url = f"http://127.0.0.1:{port}"
            subprocess.run(["kill", "-9", str(proxy_1)], check=True)
            assert any(line.startswith("proxy-1 ended (killed by SIGKILL); restart") for line in lines)
            assert httpx.post(f"{url}/v1/completions", json=body, timeout=60, verify=NO_TLS).status_code == 200
            assert any("[proxy-1]" in line and "worker_joined" in line for line in lines)
            for _ in range(MAX_CONNECTIONS):
                assert httpx.post(f"{url}/v1/completions", json=body, timeout=60, verify=NO_TLS).status_code == 200
            page = httpx.get(f"{url}/metrics", timeout=60, verify=NO_TLS).text
            assert re.search(r'vllm:request_success_total\{finished_reason="\w+",[^}]*proxy="1"\} [1-9]', page), page
        finally:
            serve.terminate()
            rest = serve.communicate(timeout=60)[0]
        assert serve.returncode == 0 and rest.endswith("stopped\n"), rest


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
