"""One attempt at a generation: the legs that it has at workers, each of which owes one terminal message.

However an attempt ends, every leg is handed back to the host once: settled by its terminal message, else cancelled.
"""

from __future__ import annotations

from baton.node.messages.control import Cancel, Prefill, Reserve, Tokens
from baton.proxy.routing.model_workers import Leg
from baton.proxy.routing.prompt_blocks import BlockNames
from baton.proxy.routing.router import Route
from baton.proxy.session_host import LegHost


class AttemptFailed(Exception):
    """This attempt is over; `workers` are to be avoided. `counts`: it counts against the limit of attempts. `transfer`:
    the KV did not come from one of them to the other. `counter` is that of the host."""

    def __init__(
        self, reason: str, *workers: str, counts: bool, transfer: bool = False, counter: str = "retries_total"
    ) -> None:
        super().__init__(reason)
        self.workers = frozenset(workers)
        self.counts = counts
        self.counter = counter
        self.transfer = transfer


class AttemptLegs:
    """The decode leg and the prefill leg of attempt `number`; of local prefill only the first."""

    def __init__(self, host: LegHost, request_id: str, number: int, route: Route) -> None:
        self.number = number
        self.decode = route.decode.identity
        self.prefill = route.prefill.identity if route.prefill is not None else ""
        self._host = host
        self._request_id = request_id
        self.decoding = False
        """Decode has sent tokens: the prefill leg does not matter any more."""
        self.early: list[Tokens] = []
        """What decode has sent before all of the prompt's log probabilities have come, over another link."""
        self._open: set[str] = set()
        self._hit_tokens: int | None = route.hit_tokens
        """Prompt tokens that the router expects the computing worker to have; None once that worker has reported."""

    @property
    def computes(self) -> str:
        """The worker that computes the prompt."""
        return self.prefill or self.decode

    def has(self, worker: str) -> bool:
        """Whether messages of this worker belong to the attempt, also behind the terminal one."""
        return worker in (self.decode, self.prefill)

    def owes(self, worker: str) -> bool:
        """Whether its leg is open: a terminal message is to come."""
        return worker in self._open

    def open(self, worker: str, message: Prefill | Reserve, names: BlockNames, tenant: str, now: float) -> None:
        """Send `worker` its leg. The host counts the tokens and blocks of it that are new to the worker."""
        computes = worker == self.computes
        leg = Leg(
            worker,
            self._request_id,
            tokens=names.num_tokens - (self._hit_tokens or 0) if computes else 0,
            blocks=names.num_blocks,
            sent_at=now,
            hashes=names.cacheable if computes else (),
            tenant=tenant,
        )
        self._open.add(worker)
        self._host.open_leg(leg, message)

    def prompt_computed(self, prompt_tokens: int, cached_tokens: int) -> None:
        """The computing worker's first token has come, of a prompt of `prompt_tokens` of which it had `cached_tokens`.
        Counts what the router foresaw beside what that worker found; a second call changes nothing."""
        if self._hit_tokens is None:
            return
        predicted = min(self._hit_tokens, prompt_tokens)
        self._hit_tokens = None
        self._host.count("kv_hit_predicted_tokens_total", predicted)
        self._host.count("kv_hit_actual_tokens_total", cached_tokens)
        self._host.count("kv_hit_missed_tokens_total", max(0, predicted - cached_tokens))
        self._host.count("kv_hit_unforeseen_tokens_total", max(0, cached_tokens - predicted))
        self._host.prompt_computed(self.computes, self._request_id)

    def transfer_ended(self, *, ok: bool) -> None:
        """The KV came from prefill to decode, or it did not."""
        self._host.transfer_ended(self.prefill, self.decode, ok=ok)

    def settle(self, worker: str) -> None:
        """Its leg has ended by itself."""
        self._end(worker, None)

    def cancel(self, worker: str) -> None:
        """End its leg. Also where the worker was lost: it may be a member again, and have got the leg since."""
        self._end(worker, Cancel(request_id=self._request_id, attempt=self.number))

    def close(self) -> None:
        """However the attempt ended: cancel the legs that are still open."""
        for worker in sorted(self._open):
            self.cancel(worker)

    def _end(self, worker: str, cancel: Cancel | None) -> None:
        if worker in self._open:
            self._open.remove(worker)
            self._host.close_leg(worker, self._request_id, computed=self._hit_tokens is None, cancel=cancel)
