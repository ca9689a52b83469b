"""python -m baton.testing.token_worker --proxy ADDRESS ...: a decode worker without a model, blocks or transfers.

It answers each request with `max_tokens` tokens, one a step, as fast as its steps are set to be. With it a benchmark
loads proxies with more tokens than a model on a CPU makes.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from baton.node.credentials import link_credentials
from baton.node.endpoint import Endpoint, identity_of
from baton.node.leg import LegKey
from baton.node.membership import Change, Membership, ProxyLost
from baton.node.messages.base import Message
from baton.node.messages.control import Bundle, Cancel, Cancelled, Load, Register, Reserve, Tokens
from baton.node.secret_file import SECRET_HELP
from baton.node.settings import option, parse
from baton.node.sockets import Context

MAX_WAIT_S = 0.05
NUM_BLOCKS = 1 << 20
MAX_SEQUENCES = 4096
FIRST_ID, NUM_IDS = 300, 1000
"""Tokens that it answers with: texts of the demo model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWorkerSettings:
    proxy: tuple[str, ...] = option((), metavar="ADDRESS", help="control address of a proxy to join, or several")
    secret_file: Path | None = option(None, metavar="FILE", help=SECRET_HELP)
    worker_id: str = option("decode-0", help="name of this worker")
    step_s: float = option(0.002, unit="s", help="time from one token of a request to the next", minimum=0.0001)


@dataclass(slots=True)
class _Sequence:
    link: str
    leg: LegKey
    max_tokens: int
    num_sent: int

    def next_token(self) -> Tokens:
        index = self.num_sent
        self.num_sent += 1
        return Tokens(
            request_id=self.leg.request_id,
            attempt=self.leg.attempt,
            index=index,
            ids=(FIRST_ID + index % NUM_IDS,),
            finish="length" if self.num_sent == self.max_tokens else "",
        )


class TokenWorker:
    """One thread: receives, steps, sends. `step_s`: from one token of a request to the next."""

    def __init__(self, endpoint: Endpoint, membership: Membership, step_s: float) -> None:
        self._endpoint = endpoint
        self._membership = membership
        self._step_s = step_s
        self._sequences: dict[LegKey, _Sequence] = {}
        self._num_steps = 0

    def run(self, stopping: threading.Event) -> None:
        step_at = 0.0
        while not stopping.is_set():
            now = time.monotonic()
            due = min(self._membership.wake_at, step_at if self._sequences else float("inf"))
            for link, message in self._endpoint.receive(min(max(due - now, 0.0), MAX_WAIT_S)):
                self._on_message(link, message)
            now = time.monotonic()
            if self._sequences and now >= step_at:
                step_at = max(step_at + self._step_s, now)
                self._step()
            self._beat(now)
        for link, goodbye in self._membership.goodbyes():
            self._send(link, goodbye)
        self._endpoint.linger()

    def _on_message(self, link: str, message: Message) -> None:
        self._on_changes(self._membership.on_message(link, message, time.monotonic()))
        match message:
            case Reserve():
                leg = LegKey(message.request_id, message.attempt)
                num_sent = len(message.body.token_ids) - message.body.prompt_len
                self._sequences[leg] = _Sequence(link, leg, message.body.sampling.max_tokens, num_sent)
            case Cancel():
                self._sequences.pop(LegKey(message.request_id, message.attempt), None)
                self._send(link, Cancelled(request_id=message.request_id, attempt=message.attempt))

    def _send(self, link: str, message: Message) -> None:
        self._endpoint.send(link, self._membership.outgoing(link, message))

    def _step(self) -> None:
        self._num_steps += 1
        bundles: dict[str, list[Tokens]] = defaultdict(list)
        for sequence in list(self._sequences.values()):
            tokens = sequence.next_token()
            bundles[sequence.link].append(tokens)
            if tokens.finish:
                del self._sequences[sequence.leg]
        for link, each in bundles.items():
            self._send(link, Bundle(tokens=tuple(each)))

    def _beat(self, now: float) -> None:
        if now < self._membership.wake_at:
            return
        num_running = len(self._sequences)
        load = Load(running=num_running, free_blocks=NUM_BLOCKS, total_blocks=NUM_BLOCKS, steps=self._num_steps)
        messages, changes = self._membership.on_timer(now, load)
        self._on_changes(changes)
        for link, message in messages:
            self._send(link, message)

    def _on_changes(self, changes: list[Change]) -> None:
        for lost in [change.link for change in changes if isinstance(change, ProxyLost)]:
            self._sequences = {leg: each for leg, each in self._sequences.items() if each.link != lost}


def main() -> int:
    settings = parse(TokenWorkerSettings, sys.argv[1:], prog="token worker", description="For benchmarks.")
    incarnation = time.time_ns() >> 10
    context = Context(link_credentials("decode", settings.secret_file, insecure_network=False))
    endpoint = Endpoint(context, identity_of(settings.worker_id, incarnation), "tcp://127.0.0.1:0")
    register = Register(
        worker=settings.worker_id,
        incarnation=incarnation,
        role="decode",
        model="none",
        namespace=b"t" * 32,
        block_tokens=16,
        total_blocks=NUM_BLOCKS,
        max_num_seqs=MAX_SEQUENCES,
        max_model_len=1 << 16,
        address=endpoint.address,
    )
    links = {f"proxy@{address}": address for address in settings.proxy}
    for link, address in links.items():
        endpoint.connect(link, address, "proxy")
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    TokenWorker(endpoint, Membership(register, tuple(links), time.monotonic()), settings.step_s).run(stopping)
    endpoint.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
