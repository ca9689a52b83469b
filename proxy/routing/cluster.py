"""Which workers are alive and how loaded: the proxy's soft state, rebuilt from registrations and heartbeats.

It knows no socket and no clock. A worker is lost when it was silent for DEAD_AFTER_S, when its connection is gone, or
when it has work and its step count stands still for `stall_s`. What is known of each is in `model_workers`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from baton.node.endpoint import identity_of
from baton.node.membership import DEAD_AFTER_S, name_error
from baton.node.messages.control import Heartbeat, Load, Register, RegisterStore
from baton.node.messages.versions import version_error
from baton.node.telemetry import excerpt
from baton.proxy.interface import WorkerStatus
from baton.proxy.routing.model_workers import KnownWorker, Leg, ModelWorkers
from baton.proxy.routing.roles import MixedRoles

MAX_WORKERS, MAX_STORES = 4096, 1024
"""Of all models; a store is a host's."""


@dataclass(slots=True)
class _Store:
    """A host's store: it computes nothing; its heartbeats and block events are all that counts."""

    register: RegisterStore
    last_message_at: float
    load: Load = field(default_factory=Load)


class ClusterState:
    """The workers of all models, and the hosts' stores, which belong to none."""

    def __init__(
        self,
        stall_s: float,
        models: Sequence[str],
        namespaces: Sequence[str] = (),
        mixed: Callable[[], MixedRoles] = lambda: MixedRoles(1.0, 0.05),
    ) -> None:
        """`models`: names under which they are served. `namespaces`: how that of a worker may begin, in hex digits;
        none: as it likes. `mixed`: makes the plan for a model's mixed workers."""
        self.models = {name: ModelWorkers(mixed()) for name in models}
        self._stores: dict[str, _Store] = {}
        self._stall_s = stall_s
        self._namespaces = tuple(namespaces)

    def join(self, identity: str, register: Register, now: float) -> str:
        """Take a worker in; returns "" or the reason for refusing it."""
        if reason := _refusal(identity, register):
            return reason
        if register.revision and (reason := name_error(register.revision)):
            return f"revision: {reason}"
        if self._namespaces and not register.namespace.hex().startswith(self._namespaces):
            return f"another namespace than --namespace {' '.join(self._namespaces)}"
        workers = self._model_of(register)
        if workers is None:
            return f"this proxy serves {', '.join(self.models)}, not {excerpt(register.model, 80)}"
        if not self.knows(identity) and sum(len(each.members) for each in self.models.values()) >= MAX_WORKERS:
            return f"there are {MAX_WORKERS} workers already"
        return workers.join(identity, register, now)

    def peers_of(self, identity: str) -> tuple[tuple[str, str], ...]:
        """What a worker that has joined should greet."""
        workers = self._workers_with(identity)
        return workers.peers_of(identity) if workers is not None else ()

    def join_store(self, identity: str, register: RegisterStore, now: float) -> str:
        """Take a store in; returns "" or the reason for refusing it."""
        if reason := _refusal(identity, register):
            return reason
        if identity not in self._stores and len(self._stores) >= MAX_STORES:
            return f"there are {MAX_STORES} stores already"
        self._stores.setdefault(identity, _Store(register, now)).last_message_at = now
        return ""

    def beat(self, identity: str, heartbeat: Heartbeat, now: float) -> bool:
        """False if nothing of this name has registered."""
        if (store := self._stores.get(identity)) is not None:
            store.last_message_at, store.load = now, heartbeat.load
            return True
        workers = self._workers_with(identity)
        if workers is None:
            return False
        workers.beat(identity, heartbeat, now)
        return True

    def lose(self, identity: str) -> bool:
        """It left or died; whether it was here until now."""
        workers = self._workers_with(identity)
        if workers is not None:
            for request_id in list(workers.members[identity].legs):
                self.settle(identity, request_id)
            workers.remove(identity)
            return True
        return self._stores.pop(identity, None) is not None

    def excuse(self, now: float) -> None:
        """This process could hear nothing until `now`: silence and standstill count from here."""
        for _, member in self._members():
            member.last_message_at = member.progress_at = now
        for store in self._stores.values():
            store.last_message_at = now

    def overdue(self, now: float) -> list[tuple[str, str]]:
        """Workers to be taken for dead, each with the reason."""
        dead = []
        for identity, member in self._members():
            if now - member.last_message_at > DEAD_AFTER_S:
                dead.append((identity, "silent"))
            elif now - member.progress_at > self._stall_s:
                dead.append((identity, "no step"))
        dead += [(identity, "silent") for identity, s in self._stores.items() if now - s.last_message_at > DEAD_AFTER_S]
        return dead

    def identities(self) -> list[str]:
        """Of all workers and stores."""
        return [*(identity for identity, _ in self._members()), *self._stores]

    def knows(self, identity: str) -> bool:
        return self._workers_with(identity) is not None or identity in self._stores

    def assign(self, leg: Leg) -> None:
        """Count work at dispatch: the next heartbeat comes too late for a burst."""
        if (workers := self._workers_with(leg.worker)) is not None:
            member = workers.members[leg.worker]
            assert leg.request_id not in member.legs, leg.request_id
            member.legs[leg.request_id] = leg
            member.view = None
            workers.shares.take(leg.tenant, member.register.role, leg.tokens, leg.blocks)

    def prompt_computed(self, worker: str, request_id: str) -> None:
        """That leg's prompt waits no longer: the next heartbeat would show it too late, as at dispatch."""
        workers = self._workers_with(worker)
        member = workers.members[worker] if workers is not None else None
        if workers is not None and member is not None and (leg := member.legs.get(request_id)) is not None:
            if leg.sent_at < member.reported_at:
                begun = min(member.begun_tokens, leg.tokens)  # prompts are computed in order, or nearly
                member.begun_tokens -= begun
                member.done_tokens += leg.tokens - begun
            workers.shares.computed(leg.tenant, leg.tokens)
            leg.tokens = 0
            member.view = None

    def settle(self, worker: str, request_id: str) -> None:
        self.prompt_computed(worker, request_id)
        if (workers := self._workers_with(worker)) is not None:
            member = workers.members[worker]
            member.view = None
            if (leg := member.legs.pop(request_id, None)) is not None:
                member.ended += leg.sent_at < member.reported_at
                workers.shares.leave(leg.tenant, member.register.role, leg.blocks)

    def is_replaced(self, identity: str) -> bool:
        """Whether this worker is an orphan, and another of its name is none, or has started later.

        Clocks may go back between two starts, or differ between hosts: the one that is no orphan takes the place."""
        member = self._member(identity)
        return (
            member is not None
            and member.orphaned
            and any(
                each is not member
                and each.register.worker == member.register.worker
                and (not each.orphaned or each.register.incarnation > member.register.incarnation)
                for _, each in self._members()
            )
        )

    def statuses(self) -> list[WorkerStatus]:
        found = [
            WorkerStatus(
                m.register.worker,
                m.register.role,
                "draining" if m.draining else "ready",
                m.load,
                m.register.block_tokens,
                model,
                m.register.revision,
                m.orphaned,
                m.register.max_loras,
            )
            for model, workers in self.models.items()
            for m in workers.members.values()
        ]
        return found + [WorkerStatus(s.register.worker, "store", "ready", s.load) for s in self._stores.values()]

    def _model_of(self, register: Register) -> ModelWorkers | None:
        """The entry that a worker joins: the only one, whatever its folder is called, else that of its model's name."""
        if len(self.models) == 1:
            (only,) = self.models.values()
            return only
        return self.models.get(register.model)

    def _workers_with(self, identity: str) -> ModelWorkers | None:
        return next((workers for workers in self.models.values() if identity in workers.members), None)

    def _member(self, identity: str) -> KnownWorker | None:
        workers = self._workers_with(identity)
        return workers.members[identity] if workers is not None else None

    def _members(self) -> Iterator[tuple[str, KnownWorker]]:
        for workers in self.models.values():
            yield from workers.members.items()


def _refusal(identity: str, register: Register | RegisterStore) -> str:
    """The reason for refusing the sender, or ""."""
    if identity != identity_of(register.worker, register.incarnation):
        return "the name in the message is not the name of the connection"
    if reason := name_error(register.worker):
        return reason
    return version_error(register.version)
