"""testing.token_worker, with which proxies are measured: each proxy gets its own tokens, all of them, in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from baton.node.credentials import Credentials
from baton.node.endpoint import Endpoint
from baton.node.membership import Membership
from baton.node.messages.base import Message
from baton.node.messages.control import (
    Bundle,
    Cancel,
    Cancelled,
    DispatchBody,
    Register,
    Registered,
    Reserve,
    SamplingSpec,
    Tokens,
)
from baton.node.sockets import Context
from baton.testing.token_worker import TokenWorker

WORKER = "decode-0/1"
REGISTER = Register(
    worker="decode-0",
    incarnation=1,
    role="decode",
    model="none",
    namespace=b"t" * 32,
    block_tokens=16,
    total_blocks=5,
    max_num_seqs=8,
    max_model_len=512,
    address="tcp://x",
)


class Proxy:
    """A proxy's end: takes the worker in, sends requests, and keeps what comes back."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.received: list[Message] = []

    def receive(self) -> None:
        for _, message in self.endpoint.receive(0.05):
            if isinstance(message, Register):
                self.endpoint.send(WORKER, Registered(proxy="proxy", incarnation=1))
            self.received += message.tokens if isinstance(message, Bundle) else [message]

    def of(self, kind: type[Message]) -> list[Message]:
        return [message for message in self.received if isinstance(message, kind)]

    def wait(self, kind: type[Message], count: int) -> None:
        deadline = time.monotonic() + 30.0
        while len(self.of(kind)) < count:
            assert time.monotonic() < deadline, self.received
            self.receive()

    def reserve(self, name: str, max_tokens: int) -> None:
        sampling = SamplingSpec(max_tokens=max_tokens)
        body = DispatchBody(
            token_ids=(1, 2), prompt_len=2, root=b"r" * 32, block_hashes=(), sampling=sampling, deadline_s=9.0
        )
        self.endpoint.send(WORKER, Reserve(request_id=name, attempt=0, body=body))


@pytest.fixture
def proxies() -> Iterator[list[Proxy]]:
    context, own = Context(Credentials("proxy")), Context(Credentials("decode"))
    made = [Proxy(Endpoint(context, "proxy", "tcp://127.0.0.1:0")) for _ in range(2)]
    endpoint = Endpoint(own, WORKER, None)
    for link, proxy in zip("ab", made, strict=True):
        endpoint.connect(link, proxy.endpoint.address, "proxy")
    stopping = threading.Event()
    worker = TokenWorker(endpoint, Membership(REGISTER, ("a", "b"), time.monotonic()), 0.001)
    thread = threading.Thread(target=worker.run, args=(stopping,), daemon=True)
    thread.start()
    for proxy in made:
        proxy.wait(Register, 1)
    yield made
    stopping.set()
    thread.join(60)
    endpoint.close()
    for proxy in made:
        proxy.endpoint.close()
    own.close()
    context.close()


def test_each_proxy_gets_all_tokens_of_its_requests(proxies: list[Proxy]) -> None:
    """Guards the figures against lost tokens, and against tokens that the other proxy gets."""
    for name, proxy in zip("xy", proxies, strict=True):
        proxy.reserve(name, 20)
    for name, proxy in zip("xy", proxies, strict=True):
        proxy.wait(Tokens, 20)
        found = [each for each in proxy.of(Tokens) if isinstance(each, Tokens)]
        assert {each.request_id for each in found} == {name} and [each.index for each in found] == list(range(20))
        assert [each.finish for each in found] == [""] * 19 + ["length"]


def test_a_cancel_is_answered(proxies: list[Proxy]) -> None:
    """Guards against a worker that goes on with streams of clients that have gone."""
    proxies[0].reserve("x", 100_000)
    proxies[0].wait(Tokens, 1)
    proxies[0].endpoint.send(WORKER, Cancel(request_id="x", attempt=0))
    proxies[0].wait(Cancelled, 1)
