"""The cluster's state: which workers are members, and how loaded they are between two heartbeats."""

from __future__ import annotations

import pytest

from baton.node.membership import DEAD_AFTER_S
from baton.node.messages.control import MAX_PEERS, Heartbeat, Load, Register, RegisterStore
from baton.proxy.routing import cluster as module
from baton.proxy.routing.cluster import ClusterState
from baton.proxy.routing.model_workers import MAX_REVISIONS, NOMINAL_TOKENS_S, Leg


def _register(worker: str = "d", incarnation: int = 1, namespace: bytes = b"n" * 32, **changes: object) -> Register:
    fields: dict[str, object] = {
        "worker": worker,
        "incarnation": incarnation,
        "role": "decode",
        "model": "m",
        "namespace": namespace,
        "block_tokens": 16,
        "total_blocks": 50,
        "max_num_seqs": 8,
        "max_model_len": 512,
        "address": "tcp://x",
        **changes,
    }
    return Register(**fields)  # type: ignore[arg-type]


def _beat(load: Load, draining: bool = False) -> Heartbeat:
    return Heartbeat(worker="d", incarnation=1, load=load, draining=draining)


def test_another_namespace_is_refused_until_the_cluster_is_empty() -> None:
    """Guards against mixed models: their KV must never meet; after all have left, another model may come."""
    cluster = ClusterState(60, ["m"])
    assert cluster.join("d/1", _register(), 0) == ""
    assert "namespace" in cluster.join("e/1", _register("e", namespace=b"m" * 32), 0)
    cluster.lose("d/1")
    assert cluster.join("e/1", _register("e", namespace=b"m" * 32), 0) == ""


def test_revisions_have_namespaces_of_their_own() -> None:
    """Guards a rolling update to a model or layout whose KV does not fit the old one's: both are served meanwhile."""
    cluster = ClusterState(60, ["m"])
    assert cluster.join("d/1", _register(), 0) == ""
    assert cluster.join("e/1", _register("e", namespace=b"m" * 32, revision="blue", max_model_len=99), 0) == ""
    assert "in revision blue" in cluster.join("f/1", _register("f", revision="blue"), 0)
    old, new = cluster.models["m"].revisions()
    assert (old.name, new.name, new.shape.namespace) == ("", "blue", b"m" * 32)
    assert [[worker.identity for worker in each.workers] for each in (old, new)] == [["d/1"], ["e/1"]]
    assert (old.shape.max_model_len, new.shape.max_model_len) == (512, 99)
    cluster.lose("d/1")
    assert [len(each.workers) for each in cluster.models["m"].revisions()] == [0, 1]


def test_mixed_workers_are_named_to_a_mixed_worker_of_their_revision() -> None:
    """Guards the pairs that are made before the first hand-over: not with other roles, nor with another revision."""
    cluster = ClusterState(60, ["m"])
    for name in ("a", "b"):
        assert cluster.join(f"{name}/1", _register(name, role="mixed", address=f"tcp://{name}"), 0) == ""
    assert cluster.join("e/1", _register("e", role="mixed", namespace=b"m" * 32, revision="blue"), 0) == ""
    assert cluster.join("d/1", _register("d"), 0) == ""
    assert cluster.peers_of("a/1") == (("b/1", "tcp://b"),)
    assert cluster.peers_of("e/1") == cluster.peers_of("d/1") == cluster.peers_of("x/1") == ()
    for number in range(2 * MAX_PEERS):
        assert cluster.join(f"m{number}/1", _register(f"m{number}", role="mixed"), 0) == ""
    assert len(cluster.peers_of("a/1")) == MAX_PEERS


def test_the_number_of_revisions_is_bounded() -> None:
    """Guards the labels of metrics, and the work of routing."""
    cluster = ClusterState(60, ["m"])
    for number in range(MAX_REVISIONS):
        assert cluster.join(f"d{number}/1", _register(f"d{number}", revision=f"r{number}"), 0) == ""
    assert "revisions already" in cluster.join("e/1", _register("e", revision="x"), 0)
    cluster.lose("d3/1")
    assert cluster.join("e/1", _register("e", revision="x"), 0) == ""
    assert len(cluster.models["m"].revision_names) == MAX_REVISIONS
    assert "letters" in cluster.join("f/1", _register("f", revision="a b"), 0)


def test_the_namespace_may_be_given() -> None:
    """Guards the workers of a proxy against one of another model that registers first: it set the namespace."""
    cluster = ClusterState(60, ["m"], namespaces=[b"n".hex() * 6])
    assert "namespace" in cluster.join("e/1", _register("e", namespace=b"m" * 32), 0)
    assert cluster.join("d/1", _register(), 0) == ""
    assert cluster.identities() == ["d/1"]


def test_the_router_sees_the_version_of_grammars() -> None:
    cluster = ClusterState(60, ["m"])
    cluster.join("d/1", _register(grammar="llguidance/1.9"), 0)
    assert [worker.grammar for worker in cluster.models["m"].view()] == ["llguidance/1.9"]


def test_a_register_evicts_no_member() -> None:
    """Guards members against refused ones, ones of another life, and ones that repeat their own."""
    cluster = ClusterState(60, ["m"])
    cluster.join("d/1", _register(), 0)
    for identity, register in (
        ("e/1", _register()),
        ("e/1", _register("e", namespace=b"m" * 32)),
        ("d/0", _register(incarnation=0)),
        ("d/1", _register(namespace=b"m" * 32)),
        ("d/1", _register(address="tcp://elsewhere")),
    ):
        cluster.join(identity, register, 0)
        assert cluster.models["m"].members["d/1"].register == _register()


@pytest.mark.parametrize(("orphans", "replaced"), [("", ""), ("1", "1"), ("2", "2"), ("12", "1")])
def test_an_orphan_makes_way_for_its_namesake(orphans: str, replaced: str) -> None:
    """Guards the memory of a GPU that an orphan holds: also where the clock has gone back since its start."""
    cluster = ClusterState(60, ["m"])
    for incarnation in (1, 2):
        assert cluster.join(f"d/{incarnation}", _register(incarnation=incarnation), 0) == ""
        beat = Heartbeat(worker="d", incarnation=incarnation, load=Load(), orphaned=str(incarnation) in orphans)
        assert cluster.beat(f"d/{incarnation}", beat, 0)
    assert [each for each in "12" if cluster.is_replaced(f"d/{each}")] == list(replaced)


def test_a_worker_that_hears_nothing_is_overdue() -> None:
    """Guards requests from a worker whose Registers arrive and that no answer reaches: it went on for ever to get some
    that it never heard of."""
    cluster = ClusterState(60, ["m"])
    for quarter in range(10):
        cluster.join("d/1", _register(), quarter / 4)
    assert cluster.overdue(2.25) == [("d/1", "silent")]


def test_a_wrong_name_or_version_is_refused() -> None:
    """Guards against a worker with another's name or another protocol version."""
    cluster = ClusterState(60, ["m"])
    assert "name" in cluster.join("x/1", _register(), 0)
    assert "version" in cluster.join("d/1", _register(version=99), 0)


def test_silence_and_standstill_are_overdue() -> None:
    """Guards detection: a frozen process, and a live one whose loop is stuck while it has work."""
    cluster = ClusterState(stall_s=10, models=["m"])
    cluster.join("d/1", _register(), 0)
    assert cluster.overdue(DEAD_AFTER_S) == []
    assert cluster.overdue(DEAD_AFTER_S + 0.01) == [("d/1", "silent")]
    for now in range(12):
        cluster.beat("d/1", _beat(Load(running=1, steps=5)), now)
    assert cluster.overdue(11) == [("d/1", "no step")]
    cluster.beat("d/1", _beat(Load(running=1, steps=6)), 12)
    assert cluster.overdue(12) == []


def test_an_idle_worker_is_not_stuck() -> None:
    """Guards against killing workers for want of work."""
    cluster = ClusterState(stall_s=10, models=["m"])
    cluster.join("d/1", _register(), 0)
    for now in range(100):
        cluster.beat("d/1", _beat(Load(steps=5)), now)
    assert cluster.overdue(99) == []


def test_work_counts_from_its_dispatch() -> None:
    """Guards against bursts: requests sent since the last heartbeat are in the view, and not counted twice after it."""
    cluster = ClusterState(60, ["m"])
    cluster.join("d/1", _register(), 0)
    cluster.beat("d/1", _beat(Load(running=2, waiting_tokens=10, free_blocks=40, total_blocks=50)), 1)
    cluster.assign(Leg("d/1", "r1", tokens=30, blocks=5, sent_at=1.5))
    (view,) = cluster.models["m"].view()
    assert (view.requests, view.tokens, view.free_blocks) == (3, 40, 35)
    cluster.beat("d/1", _beat(Load(running=3, waiting_tokens=30, free_blocks=35, total_blocks=50)), 2)
    (view,) = cluster.models["m"].view()
    assert (view.requests, view.tokens, view.free_blocks) == (3, 30, 35)
    cluster.settle("d/1", "r1")
    assert cluster.models["m"].view()[0].requests == 2, "of those that the worker reported, one has ended"
    cluster.assign(Leg("d/1", "r2", tokens=0, blocks=1, sent_at=2.5))
    cluster.settle("d/1", "r2")
    assert cluster.models["m"].view()[0].requests == 2, "the worker never reported it"
    cluster.beat("d/1", _beat(Load(running=2, free_blocks=35, total_blocks=50)), 3)
    assert cluster.models["m"].view()[0].requests == 2


def test_a_computed_prompt_waits_no_longer() -> None:
    """Guards the queue that `auto` looks at: a first token takes its prompt out of it, once, reported or not."""
    cluster = ClusterState(60, ["m"])
    cluster.join("p/1", _register("p"), 0)
    cluster.assign(Leg("p/1", "r1", tokens=30, blocks=5, sent_at=0.5))
    cluster.assign(Leg("p/1", "r2", tokens=20, blocks=5, sent_at=0.6))
    beat = Heartbeat(worker="p", incarnation=1, load=Load(running=2, waiting_tokens=45, total_blocks=50))
    cluster.beat("p/1", beat, 1)
    cluster.assign(Leg("p/1", "r3", tokens=7, blocks=1, sent_at=1.5))
    cluster.prompt_computed("p/1", "r1")
    assert cluster.models["m"].view()[0].tokens == 20 + 7  # of r1 five were computed when the worker reported
    cluster.settle("p/1", "r1")
    cluster.prompt_computed("p/1", "r3")
    assert cluster.models["m"].view()[0].tokens == 20
    cluster.settle("p/1", "r2")  # given up
    assert cluster.models["m"].view()[0].tokens == 0
    cluster.beat("p/1", beat, 2)
    assert cluster.models["m"].view()[0].tokens == 45
    cluster.prompt_computed("gone/1", "r1")
    cluster.prompt_computed("p/1", "gone")


def test_work_that_a_report_includes_is_not_counted_twice() -> None:
    """Guards against prompts that leave the queue twice: a report may be read before the tokens that came with it."""
    cluster = ClusterState(60, ["m"])
    cluster.join("p/1", _register("p"), 0)
    for number in range(3):
        cluster.assign(Leg("p/1", f"r{number}", tokens=100, blocks=5, sent_at=0.5))
    cluster.beat("p/1", _beat(Load(running=2, waiting_tokens=150, total_blocks=50)), 1)
    cluster.prompt_computed("p/1", "r0")
    assert cluster.models["m"].view()[0].tokens == 150
    cluster.prompt_computed("p/1", "r1")
    assert cluster.models["m"].view()[0].tokens == 100


def test_the_heartbeat_of_an_unknown_worker_is_refused() -> None:
    """Guards rejoining: the proxy answers an unknown worker's heartbeat so that it registers."""
    assert ClusterState(60, ["m"]).beat("d/1", _beat(Load()), 0) is False


def test_a_report_counts_from_when_it_was_true() -> None:
    """Guards against bursts during a long step: a heartbeat with a load from before a request does not hide it."""
    cluster = ClusterState(60, ["m"])
    cluster.join("d/1", _register(), 0)
    cluster.assign(Leg("d/1", "r1", tokens=30, blocks=5, sent_at=1.5))
    beat = Heartbeat(worker="d", incarnation=1, load=Load(free_blocks=50, total_blocks=50), load_age_s=1.0)
    cluster.beat("d/1", beat, 2.0)
    assert (cluster.models["m"].view()[0].requests, cluster.models["m"].view()[0].tokens) == (1, 30)
    cluster.beat("d/1", beat, 3.0)
    assert (cluster.models["m"].view()[0].requests, cluster.models["m"].view()[0].tokens) == (1, 0)


def test_speeds_are_the_workers_own_or_their_peers() -> None:
    """Guards a new worker from looking idle for ever, or slow for ever, beside measured ones."""
    cluster = ClusterState(60, ["m"])
    cluster.join("d/1", _register(), 0)
    cluster.join("e/1", _register("e"), 0)
    assert {worker.tokens_s for worker in cluster.models["m"].view()} == {NOMINAL_TOKENS_S}
    cluster.beat("d/1", _beat(Load(prefill_tokens_s=500.0)), 1)
    cluster.beat("e/1", _beat(Load()), 1)
    assert {worker.tokens_s for worker in cluster.models["m"].view()} == {500.0}
    cluster.beat("e/1", _beat(Load(prefill_tokens_s=700.0)), 2)
    cluster.beat("d/1", _beat(Load(prefill_tokens_s=500.0)), 2)
    assert {worker.tokens_s for worker in cluster.models["m"].view()} == {600.0}, "noise of a shared machine"
    cluster.beat("e/1", _beat(Load(prefill_tokens_s=4000.0)), 3)
    cluster.beat("d/1", _beat(Load(prefill_tokens_s=500.0)), 3)
    assert [worker.tokens_s for worker in cluster.models["m"].view()] == [500.0, 2250.0]


def test_a_store_is_a_member_without_work() -> None:
    """Guards the roles: a store is no worker, sets no shape, and is lost by silence like anyone."""
    cluster = ClusterState(60, ["m"])
    assert "name" in cluster.join_store("x/1", RegisterStore(worker="s", incarnation=1), 0)
    assert cluster.join_store("s/1", RegisterStore(worker="s", incarnation=1), 0) == ""
    assert cluster.models["m"].shape is None and cluster.models["m"].view() == () and cluster.knows("s/1")
    assert cluster.beat("s/1", Heartbeat(worker="s", incarnation=1, load=Load()), 1)
    assert [status.role for status in cluster.statuses()] == ["store"]
    assert cluster.overdue(1 + DEAD_AFTER_S + 0.01) == [("s/1", "silent")]
    assert cluster.lose("s/1") and not cluster.lose("s/1") and cluster.identities() == []


def test_each_worker_joins_the_entry_of_its_model() -> None:
    """Guards two models behind one proxy: a route of one never leads to a worker of the other."""
    cluster = ClusterState(60, ["a", "b"])
    assert cluster.join("d0/1", _register("d0", model="a"), 0) == ""
    assert cluster.join("d1/1", _register("d1", model="b", namespace=b"o" * 32), 0) == ""
    assert cluster.join("d2/1", _register("d2", model="c"), 0) == "this proxy serves a, b, not c"
    assert [[worker.identity for worker in entry.view()] for entry in cluster.models.values()] == [["d0/1"], ["d1/1"]]
    assert [status.model for status in cluster.statuses()] == ["a", "b"]
    cluster.assign(Leg("d1/1", "r", tokens=9, blocks=1, sent_at=1))
    assert [entry.view()[0].tokens for entry in cluster.models.values()] == [0, 9]
    assert cluster.lose("d1/1") and not cluster.lose("d1/1")
    assert cluster.models["b"].shape is None and cluster.models["a"].shape is not None


def test_members_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the proxy's memory and the page of metrics against a peer that registers under ever new names."""
    monkeypatch.setattr(module, "MAX_WORKERS", 2)
    monkeypatch.setattr(module, "MAX_STORES", 2)
    cluster = ClusterState(60, ["m", "m2"])
    workers = [cluster.join(f"w{n}/1", _register(f"w{n}", model="m2" if n else "m"), 0) for n in range(4)]
    stores = [cluster.join_store(f"s{n}/1", RegisterStore(worker=f"s{n}", incarnation=1), 0) for n in range(4)]
    assert workers == ["", "", "there are 2 workers already", "there are 2 workers already"]
    assert stores == ["", "", "there are 2 stores already", "there are 2 stores already"]
    assert cluster.join("w0/1", _register("w0"), 1) == "" and len(cluster.identities()) == 4
    cluster.lose("w0/1")
    assert cluster.join("w3/1", _register("w3"), 1) == ""


@pytest.mark.parametrize("name", ["", " ", "a b", "a\n", "\x1b[31m", 'a"} 1', "../a", "é", "a" * 65, "-a", "a/1"])
def test_a_name_that_no_log_line_can_hold_is_refused(name: str) -> None:
    """Guards log lines and labels of metrics against what a peer calls itself."""
    cluster = ClusterState(60, ["m"])
    assert "name" in cluster.join(f"{name}/1", _register(name), 0)
    assert "name" in cluster.join_store(f"{name}/1", RegisterStore(worker=name, incarnation=1), 0)
    assert cluster.identities() == []


def test_a_refusal_quotes_little() -> None:
    """Guards the answer, which has a bound of its own, against a model's name of any length."""
    reason = ClusterState(60, ["m", "n"]).join("d/1", _register(model="x\n" * 2000), 0)
    assert len(reason) < 200 and reason.isprintable()
