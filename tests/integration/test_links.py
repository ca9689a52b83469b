"""Faults of the links between processes, made by relays: stalls, one-way partitions, cuts, flipped bits, repeats.

Requests go on or end in one clear error; what goes on is compared with a run without a fault. After every test all are
members, and no worker holds a block; each checks its accounting as it exits.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from baton.testing.relay import FaultKind, LinkFault
from baton.testing.relay_board import RelayBoard
from baton.tests.integration.cluster import Cluster
from baton.tests.integration.test_failures import begin, demand_undisturbed, mixed, wait_chunks

pytestmark = pytest.mark.timeout(300)
MEMBERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")


@pytest.fixture(scope="module")
def relays() -> Iterator[RelayBoard]:
    board = RelayBoard(seed=1)
    yield board
    board.close()


@pytest.fixture(scope="module")
def shared(relays: RelayBoard, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(
        2,
        2,
        proxy_args=("--local-prefill", "never"),
        worker_args=("--plane", "zmq"),
        decode_step_s=0.01,
        store_args=(),
        relays=relays,
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    with cluster:
        requests = mixed(4)
        for stream in begin(cluster, requests):  # so that all links have been dialed
            stream.join()
        yield cluster


@pytest.fixture
def cluster(shared: Cluster, relays: RelayBoard) -> Iterator[Cluster]:
    yield shared
    relays.set_fault(relays.links(), None)
    shared.wait_workers(*MEMBERS)
    shared.wait_idle()


@pytest.mark.parametrize("kind", ["proxy-prefill", "proxy-decode", "prefill-decode", "data", "worker-store"])
def test_every_link_of_a_kind_is_reset(cluster: Cluster, relays: RelayBoard, kind: str) -> None:
    """Guards requests whose messages were under way: what was lost with a connection must not be waited for."""
    requests = mixed(6, sentences=8)
    streams = begin(cluster, requests)
    wait_chunks(cluster, streams[:1], 2)
    relays.set_fault(relays.links(kind), LinkFault(FaultKind.RESET))
    demand_undisturbed(cluster, requests, streams)
