"""node.probe: answers at once whatever the loops do, to strangers too, and lets no stranger keep others out."""

from __future__ import annotations

import http.client
import socket

import pytest

from baton.node.errors import SettingsError
from baton.node.probe import LIVE_S, MAX_CONNECTIONS, NodeState, NoProbes, Probes, answer_of, open_probes

READY = NodeState(turned_at=100.0, unready="")
DRAINING = NodeState(turned_at=100.0, unready="draining")
TIMEOUT_S = 60.0


@pytest.mark.parametrize(
    ("line", "state", "now", "status"),
    [
        (b"GET /live HTTP/1.1", READY, 100.0, 200),
        (b"GET /ready HTTP/1.1", READY, 100.0, 200),
        (b"GET /ready?verbose HTTP/1.0", READY, 100.0, 200),
        (b"GET /live HTTP/1.1", DRAINING, 100.0, 200),
        (b"GET /ready HTTP/1.1", DRAINING, 100.0, 503),
        (b"GET /live HTTP/1.1", READY, 100.0 + LIVE_S, 200),
        (b"GET /live HTTP/1.1", READY, 100.5 + LIVE_S, 503),
        (b"GET /ready HTTP/1.1", READY, 100.5 + LIVE_S, 503),
        (b"POST /ready HTTP/1.1", READY, 100.0, 405),
        (b"GET /metrics HTTP/1.1", READY, 100.0, 404),
        (b"GET / HTTP/1.1", READY, 100.0, 404),
        (b"", READY, 100.0, 404),
        (b"\xff\x00 \xff", READY, 100.0, 404),
    ],
)
def test_a_draining_node_lives_and_is_not_ready(line: bytes, state: NodeState, now: float, status: int) -> None:
    """Guards against a drain that is ended by a liveness probe, and a stopped loop that is sent requests."""
    assert answer_of(line, state, now)[0] == status


def ask(port: int, path: str, host: str = "127.0.0.1") -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def free_probes(host: str = "127.0.0.1") -> Probes:
    return Probes(host, 0, clock=lambda: 100.0)


def test_a_node_is_not_ready_until_it_has_started_and_once_it_drains() -> None:
    """Guards a rolling update: a successor that counts as ready while it loads lets the last old worker go."""
    with free_probes() as probes:
        assert ask(probes.port, "/live") == (200, "live\n")
        assert ask(probes.port, "/ready") == (503, "starting\n")
        probes.watch(lambda: READY)
        assert ask(probes.port, "/ready") == (200, "ready\n")
        probes.watch(lambda: DRAINING)
        assert ask(probes.port, "/ready") == (503, "draining\n")


def test_idle_connections_keep_no_probe_out() -> None:
    """Guards against strangers that have a node killed: connections that are held open make its probes time out."""
    with free_probes() as probes:
        idle = [socket.create_connection(("127.0.0.1", probes.port)) for _ in range(3 * MAX_CONNECTIONS)]
        assert ask(probes.port, "/live") == (200, "live\n")
        for each in idle:
            each.close()


def test_a_head_without_an_end_is_answered_at_the_bound() -> None:
    """Guards against a stranger whose endless head fills the memory."""
    with free_probes() as probes, socket.create_connection(("127.0.0.1", probes.port), TIMEOUT_S) as stranger:
        stranger.sendall(b"GET /live HTTP/1.1\r\n" + b"x: y\r\n" * 2000)
        assert stranger.recv(12) == b"HTTP/1.1 200"


def test_the_end_frees_the_port_and_its_connections() -> None:
    """Guards a restart at the same port."""
    probes = free_probes()
    with probes:
        port = probes.port
        stranger = socket.create_connection(("127.0.0.1", port), TIMEOUT_S)
        assert ask(port, "/live")[0] == 200
    try:
        left = stranger.recv(1)
    except ConnectionResetError:
        left = b""
    stranger.close()
    assert left == b""
    with Probes("127.0.0.1", port):
        pass


def test_all_addresses_are_those_of_both_families() -> None:
    """Guards a worker that binds [::] in a cluster whose kubelet probes over IPv4."""
    if not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with free_probes("::") as probes:
        assert ask(probes.port, "/live")[0] == 200
        assert ask(probes.port, "/live", "::1")[0] == 200


def test_an_interface_is_probed_at_its_address() -> None:
    """Guards `--bind tcp://eth0:0`, with which a container need not know its address."""
    with free_probes("lo") as probes:
        assert ask(probes.port, "/live")[0] == 200


def test_a_port_that_cannot_be_had_is_an_error_at_once() -> None:
    """Guards against a worker that loads a model for minutes before it finds its port taken."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"--probe-port {port}: cannot listen at 127.0.0.1: "):
            open_probes(port, "tcp://127.0.0.1:0")
    with pytest.raises(SettingsError, match="--probe-port 1234: no address for 'no host'"):
        open_probes(1234, "tcp://no host:0")
    assert isinstance(open_probes(None, "tcp://127.0.0.1:0"), NoProbes)
