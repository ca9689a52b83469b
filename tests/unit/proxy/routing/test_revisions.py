"""proxy.routing.revisions: which of several revisions gets a request."""

from __future__ import annotations

from dataclasses import replace

from baton.proxy.routing.kvindex import Hit
from baton.proxy.routing.model_workers import ClusterShape, Revision
from baton.proxy.routing.revisions import RevisionOffer, in_order
from baton.proxy.routing.router import RequestView, WorkerView

SHAPE = ClusterShape(b"n" * 32, 16, 512)
REQUEST = RequestView(num_tokens=32, num_blocks=2, turn=0, block_tokens=16)


def _decode(identity: str, requests: int = 0, draining: bool = False) -> WorkerView:
    return WorkerView(identity, "tcp://x", "decode", draining, requests, 0, 100, 100, 8, 1000.0)


def _offer(name: str, *workers: WorkerView, request: RequestView = REQUEST) -> RevisionOffer:
    return RevisionOffer(Revision(name, SHAPE, workers), request)


def _names(*offers: RevisionOffer) -> list[str]:
    return [offer.revision.name for offer in in_order(offers)]


def test_each_revision_gets_what_its_workers_can_take() -> None:
    """Guards the new worker of a rolling update from getting half of all requests, and the old ones from all."""
    loads = {"old": 0, "new": 0}
    for turn in range(12):
        old = [_decode(f"o{number}", loads["old"] // 2) for number in range(2)]
        request = replace(REQUEST, turn=turn)
        name, _ = _names(
            _offer("old", *old, request=request), _offer("new", _decode("n", loads["new"]), request=request)
        )
        loads[name] += 1
    assert loads == {"old": 8, "new": 4}


def test_a_revision_that_drains_is_the_last() -> None:
    drains = _offer("old", _decode("o", draining=True))
    assert _names(_offer("gone"), drains, _offer("new", _decode("n", requests=7)))[0] == "new"


def test_equals_take_turns() -> None:
    offers = [_offer(name, _decode(name), request=replace(REQUEST, turn=1)) for name in "ab"]
    assert _names(*offers) == ["b", "a"]


def test_a_conversation_stays_where_its_prefix_is_unless_that_is_much_more_loaded() -> None:
    """Guards the prefix caches of a rolling update, in which each turn could go to another revision."""
    holds = replace(REQUEST, hits={"o": Hit(gpu=2)})
    for requests, first in ((1, "old"), (4, "new")):
        assert _names(_offer("old", _decode("o", requests), request=holds), _offer("new", _decode("n")))[0] == first
