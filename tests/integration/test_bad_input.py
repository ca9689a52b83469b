"""Invalid HTTP requests and hostile bytes on every port of real processes: a clear error or none, and no damage.

After every test the cluster must answer as before, with every block free or cached, in the same processes.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import zmq

from baton.node.credentials import Keys, NodeRole
from baton.node.messages.base import encode
from baton.node.messages.control import (
    Bundle,
    Cancel,
    Cancelled,
    Failed,
    HandedOver,
    Heartbeat,
    Load,
    Ping,
    Refused,
    Rejoin,
    Reserved,
    SamplingSpec,
    Tokens,
)
from baton.node.messages.wire import MESSAGES
from baton.node.secret_file import read_secret
from baton.tests.integration.cluster import Cluster
from baton.tests.integration.untrusted import (
    RawClient,
    SecondProxy,
    one_of_each,
    prefill_of,
    register_of,
    reserve_of,
)
from baton.tests.unit.node.test_raw_frames import COUNTED, GREETING, HUNG_UP, VALID, hears_the_end, ready

PROMPT = "Once upon a time there was a little fox who lived in the forest. The old king had three daughters."
ANSWER: dict[str, Any] = {"max_tokens": 24, "ignore_eos": True}


PEERS: dict[str, NodeRole] = {"proxy": "decode", "prefill-0": "decode", "decode-0": "prefill"}
"""By node, the role of a peer that its sockets let in."""


def keys_of(cluster: Cluster) -> Keys:
    return Keys(read_secret(cluster.nodes.ports.secret_file))


def insider(cluster: Cluster, place: str, identity: bytes = b"unknown/1", kind: int = zmq.DEALER) -> RawClient:
    """A raw client with the secret at a port of `all_ports`, in a role that is let in there."""
    name, port = place.split(":")
    server: NodeRole = "proxy" if name == "proxy" else PEERS[PEERS[name] + "-0"]
    return RawClient(int(port), identity, kind, keys=keys_of(cluster), role=PEERS[name], server=server)


@pytest.fixture(scope="module")
def second_proxy() -> Iterator[SecondProxy]:
    playing = SecondProxy()
    yield playing
    playing.close()


@pytest.fixture(scope="module")
def shared(second_proxy: SecondProxy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster with a data port to attack, since KV moves over ZeroMQ; the test acts as a second proxy."""
    cluster = Cluster(
        proxy_args=("--local-prefill", "never", "--request-timeout-s", "240"),
        worker_args=("--plane", "zmq", "--proxy", second_proxy.address, "--num-blocks", "256"),
        log_folder=tmp_path_factory.mktemp("logs"),
    )
    second_proxy.listen(keys_of(cluster))
    with cluster:
        yield cluster


def departures(cluster: Cluster) -> list[str]:
    """Workers that left or registered again, and why, but for silence: a busy machine can hold a worker up for longer
    than the proxy waits for its heartbeats."""
    lines = re.findall(r"worker_(?:left|lost) .*", cluster.nodes.log("proxy"))
    return [line for line in lines if not line.endswith(" reason=silent")]


@pytest.fixture
def cluster(shared: Cluster) -> Iterator[Cluster]:
    expected = shared.complete(PROMPT, **ANSWER)["choices"]
    pids = {name: shared.nodes.pid(name) for name in shared.nodes.names()}
    left = departures(shared)
    yield shared
    shared.wait_workers("prefill-0", "decode-0")
    shared.wait_idle()
    assert shared.complete("Not cached: " + PROMPT, **ANSWER)["choices"][0]["finish_reason"] == "length"
    assert shared.complete(PROMPT, **ANSWER)["choices"] == expected
    assert {name: shared.nodes.pid(name) for name in shared.nodes.running()} == pids
    assert departures(shared) == left, "a worker has left in between"
    for name in shared.nodes.names():
        assert "Traceback" not in shared.nodes.log(name)
    shared.wait_idle()


# ---- HTTP -------------------------------------------------------------------------------------------------------

GOOD = {"model": "demo", "prompt": "Hello", "max_tokens": 4}

BAD_BODIES: dict[str, tuple[int, Any]] = {
    "prompt too long": (400, GOOD | {"prompt": "king " * 5000}),
    "one token too long": (400, GOOD | {"prompt": [5] * 2048}),
    "empty prompt": (400, GOOD | {"prompt": ""}),
    "no prompt": (400, {"model": "demo"}),
    "unknown model": (404, GOOD | {"model": "gpt-9"}),
    "negative max_tokens": (400, GOOD | {"max_tokens": -1}),
    "huge max_tokens": (400, GOOD | {"max_tokens": 10**30}),
    "huge temperature": (400, GOOD | {"temperature": 1e300}),
    "negative seed": (400, GOOD | {"top_p": -0.5}),
    "huge n": (400, GOOD | {"n": 10**9}),
    "wrong types": (400, GOOD | {"prompt": {"text": "Hello"}, "max_tokens": "4"}),
    "token out of the vocabulary": (400, GOOD | {"prompt": [4096]}),
    "negative token": (400, GOOD | {"prompt": [-1]}),
    "huge token": (400, GOOD | {"prompt": [2**70]}),
    "half a surrogate pair": (400, b'{"model": "demo", "prompt": "\\ud800", "max_tokens": 4}'),
    "not UTF-8": (400, b'{"model": "demo", "prompt": "\xff\xfe\xfd", "max_tokens": 4}'),
    "deep JSON": (400, b'{"model": "demo", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "no JSON": (400, b"\x00\x01\x02"),
    "no object": (400, b"[]"),
    "nothing": (400, b""),
    "10 MB": (400, b'{"model": "demo", "prompt": "' + b"x" * 10_000_000 + b'"}'),
}


def test_bad_bodies(cluster: Cluster) -> None:
    """Guards every layer that reads a body: each error names the field, in OpenAI's format."""
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        for name, (status, body) in BAD_BODIES.items():
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            answer = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
            assert answer.status_code == status, (name, answer.status_code, answer.text[:300])
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}, name
            assert answer.json()["error"]["type"] == "invalid_request_error", name


def test_a_10_mb_prompt_in_a_list_of_tokens_and_in_a_chat(cluster: Cluster) -> None:
    """Guards the token-list and chat entry points against oversized prompts."""
    with httpx.Client(base_url=cluster.url, timeout=60) as client:
        chat = {"model": "demo", "messages": [{"role": "user", "content": "x" * 10_000_000}]}
        assert client.post("/v1/chat/completions", json=chat).status_code == 400
        assert client.post("/v1/completions", json=GOOD | {"prompt": [5] * 4_000_000}).status_code == 400
        assert client.post("/v1/completions", json=GOOD | {"prompt": [5] * 100_000}).status_code == 400
        assert client.post("/v1/chat/completions", json=chat | {"messages": []}).status_code == 400


def test_a_body_that_never_ends_and_one_that_is_cut(cluster: Cluster) -> None:
    """Guards against clients that send a part of a request and stall or disconnect."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    waiting = [socket.create_connection(("127.0.0.1", cluster.nodes.port), timeout=60) for _ in range(20)]
    for number, connection in enumerate(waiting):
        connection.sendall(head + b'{"model": "demo"' * (number % 3))
    for connection in waiting[::2]:
        connection.close()
    assert cluster.complete("Hello", max_tokens=2)["usage"]["completion_tokens"] == 2
    for connection in waiting[1::2]:
        connection.close()


# ---- bytes on every port ----------------------------------------------------------------------------------------


def all_ports(cluster: Cluster) -> dict[str, int]:
    """Every port that any process of the cluster listens on."""
    return {f"{name}:{port}": port for name in cluster.nodes.names() for port in cluster.ports(name)}


def test_the_attacked_ports_exist(cluster: Cluster) -> None:
    """Guards against a missed port: control and HTTP of the proxy; endpoint and data of each worker, of a decode worker
    also data by layers, from workers with stages."""
    names = [place.partition(":")[0] for place in all_ports(cluster)]
    assert {name: names.count(name) for name in names} == {"proxy": 2, "prefill-0": 2, "decode-0": 3}


def test_random_bytes(cluster: Cluster) -> None:
    """Guards every listener against random bytes, connections closed at once, and silent ones."""
    chance = random.Random(1)
    opened = []
    for port in all_ports(cluster).values():
        for length in (0, 1, 9, 10, 64, 65, 1000, 100_000):
            connection = socket.create_connection(("127.0.0.1", port), timeout=60)
            opened.append(connection)
            with contextlib.suppress(OSError):  # it may close while we send
                connection.sendall(chance.randbytes(length))
    streams = [cluster.begin(PROMPT, **ANSWER) for _ in range(4)]
    assert all(stream.join().finish == "length" for stream in streams)
    for connection in opened:
        connection.close()


def test_broken_zmtp(cluster: Cluster) -> None:
    """Guards against frames that reach a node from a client without keys, and against a frame of 2^63 bytes: the node
    hangs up on the greeting. What nodes without keys do with such frames is in tests/unit/node/test_raw_frames.py."""
    chance = random.Random(2)
    frames = [*HUNG_UP.values(), *(broken for broken, _ in COUNTED.values()), chance.randbytes(5000)]
    rejected = {name: cluster.nodes.log(name).count("message_rejected") for name in cluster.nodes.names()}
    for place, port in all_ports(cluster).items():
        for frame in frames:
            with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
                with contextlib.suppress(ConnectionError):  # it may close while we send
                    connection.sendall(GREETING + ready(b"unknown/1") + VALID + frame)
                if place != f"proxy:{cluster.nodes.port}":
                    assert b"READY" not in hears_the_end(connection), place
    assert cluster.complete(PROMPT + " After random bytes.", **ANSWER)["usage"]["completion_tokens"] == 24
    for name, count in rejected.items():
        assert cluster.nodes.log(name).count("message_rejected") == count, name


CURVE_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(15) + b"\x00" + bytes(31)


def test_broken_zmtp_before_any_key(cluster: Cluster) -> None:
    """Guards the handshake of encrypted links: its frames come from anybody, of any size."""
    frames = [*HUNG_UP.values(), *(broken for broken, _ in COUNTED.values()), random.Random(4).randbytes(5000)]
    opened = []
    for port in all_ports(cluster).values():
        for frame in frames:
            connection = socket.create_connection(("127.0.0.1", port), timeout=60)
            opened.append(connection)
            with contextlib.suppress(ConnectionError):  # it may close while we send
                connection.sendall(CURVE_GREETING + frame)
    assert cluster.complete(PROMPT + " After those, too.", **ANSWER)["usage"]["completion_tokens"] == 24
    for connection in opened:
        connection.close()


def test_garbage_frames(cluster: Cluster) -> None:
    """Guards against well-framed garbage: no message, half a message, too many frames, an identity that is not text."""
    chance = random.Random(3)
    whole = encode(Ping(proxy="proxy", incarnation=1))
    for place in all_ports(cluster):
        if place == f"proxy:{cluster.nodes.port}":
            continue
        for identity in (b"unknown/1", b"\xff\xfe", b"x" * 255):
            with insider(cluster, place, identity) as client:
                for length in (0, 1, 2, 33, 1000):
                    client.frames(chance.randbytes(length))
                client.frames(b"", whole)
                client.frames(*[b"x"] * 200)
                client.frames(whole[:-1])
                client.frames(whole + b"\x00")
                client.frames(b"\xc1" * 10)
                client.frames(b"\x91" * 5000)
        for kind in (zmq.REQ, zmq.PUSH, zmq.PUB, zmq.PAIR):
            with insider(cluster, place, b"", kind) as client:
                client.frames(b"garbage")
    assert cluster.nodes.log("proxy").count("message_rejected") and cluster.nodes.log("prefill-0").count(
        "message_rejected"
    )


def test_oversized_frames(cluster: Cluster) -> None:
    """Guards memory: a frame above the limit ends its connection before it is read."""
    for place in all_ports(cluster):
        if place != f"proxy:{cluster.nodes.port}":
            with insider(cluster, place) as client:
                client.frames(b"x" * (32 << 20))
    for name in cluster.nodes.names():
        status = Path(f"/proc/{cluster.nodes.pid(name)}/status").read_text()
        resident_kib = int(re.findall(r"VmRSS:\s+(\d+)", status)[0])
        assert resident_kib < 2 << 20, f"{name} has grown to {resident_kib} KiB"


# ---- valid messages from the wrong peer -------------------------------------------------------------------------


def test_every_message_is_used_by_these_tests() -> None:
    """Guards the list below against missing a message that is added later."""
    names = {type(message).__name__ for message in one_of_each("x")} | {"Bundle"}
    assert names == {kind.__name__ for kind in MESSAGES}


def identity(cluster: Cluster, name: str) -> str:
    """The endpoint identity of a worker, `name/incarnation`, from its log."""
    return re.findall(rf"worker_started worker=({name}/\d+)", cluster.nodes.log(name))[-1]


def test_messages_of_unknown_and_impersonating_peers(cluster: Cluster) -> None:
    """Guards a running stream against every message type from any peer other than its proxy, prefill or decode worker,
    also under their identities, which are not secret."""
    names = ["unknown/1", identity(cluster, "prefill-0"), identity(cluster, "decode-0"), "proxy"]
    names.append(f"proxy@tcp://127.0.0.1:{cluster.nodes.ports.control}")  # a worker's name of its link to the proxy
    body = ANSWER | {"max_tokens": 400}
    streams = []
    for place in [place for place in all_ports(cluster) if place != f"proxy:{cluster.nodes.port}"]:
        stream = cluster.begin(PROMPT + " Untrusted.", **body)
        streams.append(stream)
        cluster.wait_until(lambda stream=stream: stream.num_chunks > 3, "the stream has begun")
        request_id = f"{stream.id}-0"
        for name in names:
            with insider(cluster, place, name.encode()) as client:
                client.send(*one_of_each(request_id))
                client.send(*one_of_each(request_id)[::-1])
        assert not stream.ended, "the stream was too short for this test"
    wanted = cluster.complete(PROMPT + " Untrusted.", **body)["choices"][0]["text"]
    for stream in streams:
        assert stream.join().finish == "length" and stream.error is None and stream.broken is None
        assert stream.text == wanted
    assert "draining" not in cluster.nodes.log("prefill-0") + cluster.nodes.log("decode-0")


def test_register_under_a_wrong_name(cluster: Cluster) -> None:
    """Guards membership: a worker that registers with a wrong name or model is refused and does not become a member."""
    with insider(cluster, f"proxy:{cluster.nodes.ports.control}", b"liar/1") as client:
        client.send(register_of("liar", 2, bytes(32)), register_of("liar", 1, bytes(32)))
        client.send(Heartbeat(worker="liar", incarnation=1, load=Load(running=3)))
        received = client.receive(60.0, 3)
    assert [type(message) for message in received] == [Refused, Refused, Rejoin]
    assert isinstance(received[1], Refused) and "namespace" in received[1].reason


# ---- a faulty proxy ---------------------------------------------------------------------------------------------


INVALID_BODIES: dict[str, dict[str, Any]] = {
    "no tokens": {"token_ids": (), "prompt_len": 0},
    "more prompt than tokens": {"prompt_len": 2000},
    "no prompt": {"prompt_len": 0},
    "tokens outside the vocabulary": {"token_ids": (5, 2**31 - 1, 7)},
    "more tokens than the model takes": {"token_ids": (5,) * 5000, "prompt_len": 5000},
    "more hashes than blocks": {"block_hashes": (b"h" * 32,) * 9},
}


def test_impossible_requests_fail(cluster: Cluster, second_proxy: SecondProxy) -> None:
    """Guards workers against a proxy of another version or with a bug: one terminal message each, and no crash."""
    prefill, decode_worker = second_proxy.join()
    for number, changes in enumerate(INVALID_BODIES.values()):
        second_proxy.send(prefill, prefill_of(f"invalid-{number}", "unknown/1", **changes))
        second_proxy.send(decode_worker, reserve_of(f"invalid-{number}", "", **changes))
    for worker in (prefill, decode_worker):
        answers = second_proxy.receive(worker, len(INVALID_BODIES))
        for number, (name, answer) in enumerate(zip(INVALID_BODIES, answers, strict=True)):
            assert isinstance(answer, Failed) and answer.request_id == f"invalid-{number}", (name, answer)
            assert not answer.retryable and answer.reason


def test_unreachable_peers(cluster: Cluster, second_proxy: SecondProxy) -> None:
    """Guards a worker against an invalid peer address, and against a peer that never sends Hello."""
    prefill, decode_worker = second_proxy.join()
    addresses = ("", "nonsense", "tcp://", "tcp://127.0.0.1:99999999", "tcp://127.0.0.1:1", "udp://127.0.0.1:1")
    for number, address in enumerate(addresses):
        message = prefill_of(f"far-{number}", f"unknown/{number}", decode_address=address, deadline_s=2.0)
        second_proxy.send(prefill, message)
    second_proxy.send(decode_worker, reserve_of("far", "unknown/1", deadline_s=1.0))
    ends: list[str] = []
    while len(ends) < len(addresses):  # some have a first token before
        (answer,) = second_proxy.receive(prefill, 1)
        ends += [answer.request_id] if isinstance(answer, Failed) else []
    assert sorted(ends) == [f"far-{number}" for number in range(len(addresses))]
    assert [type(answer) for answer in second_proxy.receive(decode_worker, 2)] == [Reserved, Failed]


def test_replayed_messages(cluster: Cluster, second_proxy: SecondProxy) -> None:
    """Guards against duplicate messages: a leg is computed once, and every Cancel is answered."""
    prefill, decode_worker = second_proxy.join()
    reserve = reserve_of("again", "", sampling=SamplingSpec(max_tokens=200, min_tokens=200), deadline_s=120.0)
    second_proxy.send(decode_worker, *[reserve] * 20)
    cancel = Cancel(request_id="again", attempt=0)
    assert isinstance(second_proxy.receive(decode_worker, 1)[0], Reserved)
    second_proxy.send(decode_worker, *[cancel] * 3, Cancel(request_id="the last one", attempt=0))
    answers: list[Any] = []
    while not answers or answers[-1].request_id != "the last one":
        answers += [each for each in second_proxy.receive(decode_worker, 1) if not isinstance(each, Bundle)]
    kinds = [type(answer) for answer in answers]
    assert kinds.count(Reserved) == 0 and kinds.count(Cancelled) == 4
    reserve = reserve_of("pair", f"prefill-0/{prefill.incarnation}", deadline_s=120.0)
    message = prefill_of(
        "pair", f"decode-0/{decode_worker.incarnation}", decode_address=decode_worker.address, deadline_s=120.0
    )
    second_proxy.send(decode_worker, *[reserve] * 5)
    second_proxy.send(prefill, *[message] * 5)
    received = second_proxy.receive(prefill, 2)
    assert [type(answer) for answer in received] == [Tokens, HandedOver]
    second_proxy.send(prefill, *[message] * 5)  # its transfer has ended, and decode does not wait for it any more
    replay = next(answer for answer in second_proxy.receive(prefill, 2) if not isinstance(answer, Tokens))
    assert isinstance(replay, Failed) and "before" in replay.reason
    second_proxy.send(prefill, Cancel(request_id="pair", attempt=0))
    second_proxy.send(decode_worker, Cancel(request_id="pair", attempt=0))
