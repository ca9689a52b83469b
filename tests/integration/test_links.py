"""Faults of the links between processes, made by relays: stalls, one-way partitions, cuts, flipped bits, repeats.

Requests go on or end in one clear error; what goes on is compared with a run without a fault. After every test all are
members, and no worker holds a block; each checks its accounting as it exits.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from baton.testing.relay import FaultKind, LinkFault, Toward
from baton.testing.relay_board import LINK_KINDS, RelayBoard
from baton.tests.integration.cluster import Cluster, Stream
from baton.tests.integration.test_failures import begin, demand_undisturbed, mixed, wait_chunks

MEMBERS = ("prefill-0", "prefill-1", "decode-0", "decode-1")
DAMAGED = ("proxy-decode", "prefill-decode", "data", "worker-store")


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
        # A request that every kind of reset meets needs so many attempts.
        proxy_args=("--local-prefill", "never", "--max-attempts", str(2 + len(LINK_KINDS))),
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


def test_every_kind_of_link_is_reset_in_turn(cluster: Cluster, relays: RelayBoard) -> None:
    """Guards requests whose messages were under way: what was lost with a connection must not be waited for."""
    requests = mixed(6 + len(LINK_KINDS), sentences=8)
    streams = begin(cluster, requests[:6])
    for kind in LINK_KINDS:
        wait_progress(cluster, streams)
        streams += begin(cluster, requests[len(streams) :][:1])
        relays.set_fault(relays.links(kind), LinkFault(FaultKind.RESET))
    demand_undisturbed(cluster, requests, streams)


def wait_progress(cluster: Cluster, streams: list[Stream]) -> None:
    """Until each stream that has not ended has got more."""
    before = [stream.num_chunks for stream in streams]

    def progressed() -> bool:
        return all(stream.ended or stream.num_chunks > seen for stream, seen in zip(streams, before, strict=True))

    cluster.wait_until(progressed, "all streams go on")


@pytest.mark.parametrize(
    ("kind", "toward"),
    [
        ("proxy-decode", Toward.TARGET),
        ("proxy-prefill", Toward.DIALER),
        ("prefill-decode", Toward.TARGET),
        ("prefill-decode", Toward.DIALER),
        ("data", Toward.TARGET),
        ("worker-store", Toward.DIALER),
    ],
)
def test_a_one_way_partition(cluster: Cluster, relays: RelayBoard, kind: str, toward: Toward) -> None:
    """Guards against peers that hear and are not heard: requests go on over other workers while it lasts."""
    links = relays.links(kind)
    relays.set_fault([link for link in links if link.dialer == links[0].dialer], LinkFault(FaultKind.STALL, toward))
    requests = mixed(4)
    streams = [stream.join() for stream in begin(cluster, requests)]
    relays.set_fault(relays.links(), None)
    demand_undisturbed(cluster, requests, streams)


@pytest.mark.parametrize("kind", [FaultKind.FLIP, FaultKind.REPEAT, FaultKind.CUT])
def test_links_that_damage_what_passes(cluster: Cluster, relays: RelayBoard, kind: FaultKind) -> None:
    """Guards against hangs, and against errors that blame the client: what is lost or unreadable is noticed."""
    damaged = [links[0] for each in DAMAGED if (links := relays.links(each))]
    relays.set_fault(damaged, LinkFault(kind, amount=20_000.0 if kind is FaultKind.CUT else 0.05))
    streams = [stream.join() for stream in begin(cluster, mixed(6))]
    assert [stream.broken for stream in streams if stream.broken is not None] == []
    refused = [stream.error["type"] for stream in streams if stream.error is not None]
    assert set(refused) <= {"server_error"}


def test_two_faults_at_once(cluster: Cluster, relays: RelayBoard) -> None:
    """Guards the retry: while requests move from a worker that died, the other's link breaks."""
    requests = mixed(6)
    streams = begin(cluster, requests)
    wait_chunks(cluster, streams[:1], 2)
    cluster.nodes.kill("decode-0")
    relays.set_fault(relays.links("proxy-decode"), LinkFault(FaultKind.RESET))
    demand_undisturbed(cluster, requests, streams)
    cluster.nodes.revive()
