"""Processes on the same host without the cluster's secret: none is heard at any port, joins, or disturbs a request."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from baton.node.credentials import Keys, NodeRole
from baton.node.messages.store import Attach, PeerLookup
from baton.node.secret_file import read_secret, write_secret
from baton.tests.integration.cluster import Cluster
from baton.tests.integration.untrusted import RawClient, one_of_each, register_of

PROMPT = "Once upon a time there was a little fox who lived in the forest."
MEMBERS = ("decode-0", "prefill-0")
TIMEOUT_S = 60.0


class StolenAddressBook(Keys):
    """Knows the public keys of the cluster's servers, and has no private key that they let in."""

    def __init__(self, servers: Keys) -> None:
        super().__init__(os.urandom(32))
        self._servers = servers

    def public(self, role: NodeRole) -> bytes:
        return self._servers.public(role)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(
        worker_args=("--plane", "zmq"),
        store_args=("--ram-gib", "0.05"),
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    with made as running:
        yield running


def test_a_stranger_is_not_heard_at_any_port(cluster: Cluster) -> None:
    """Guards prompts, answers, membership and the store: what a stranger sends is not even looked at as a message."""
    before = cluster.complete(PROMPT, max_tokens=24)["choices"]
    keys = Keys(read_secret(cluster.nodes.ports.secret_file))
    servers: dict[str, NodeRole] = {"proxy": "proxy", "store": "store", "prefill-0": "prefill", "decode-0": "decode"}
    sent = [*one_of_each("x"), Attach(namespace=bytes(32), block_bytes=4096, num_units=1, digest="xxh3")]
    sent.append(PeerLookup(id=1, namespace=bytes(32), hashes=(bytes(32),)))
    for name, server in servers.items():
        for port in cluster.ports(name):
            for own in (None, Keys(os.urandom(32)), StolenAddressBook(keys)) if port != cluster.nodes.port else ():
                with RawClient(port, b"dx/7", keys=own, server=server) as stranger:
                    stranger.send(register_of("dx", 7, bytes(32)), *sent)
                    assert stranger.receive(0.3) == []
    assert cluster.complete(PROMPT, max_tokens=24)["choices"] == before
    assert set(cluster.worker_values("running")) == set(MEMBERS)
    for name in servers:
        cluster.wait_until(lambda name=name: "peer_refused" in cluster.nodes.log(name), f"{name} says whom it refused")
        log = cluster.nodes.log(name)
        assert "message_rejected" not in log and "Traceback" not in log


def test_a_worker_with_another_secret_does_not_join_and_says_why(cluster: Cluster, tmp_path: Path) -> None:
    """Guards the cluster against a worker of another one, and the user who mistook the files."""
    write_secret(tmp_path / "other")
    cluster.nodes.add_worker("decode", "other-secret", "--secret-file", str(tmp_path / "other"))
    cluster.wait_until(lambda: "link_refused" in cluster.nodes.log("other-secret"), "a line that says why", TIMEOUT_S)
    assert "another secret" in cluster.nodes.log("other-secret")
    assert set(cluster.worker_values("running")) == set(MEMBERS)
    cluster.nodes.signal("other-secret", signal.SIGTERM)
    assert cluster.wait_end("other-secret") == 0
    cluster.nodes.forget("other-secret")
