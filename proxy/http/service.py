"""What all requests of one app share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice

from starlette.types import Receive, Scope

from baton.node.errors import BadRequest, Overloaded, PeerLost
from baton.proxy.adapter_changes import AdapterChanges
from baton.proxy.adapter_names import AdapterNames, NamedAdapter
from baton.proxy.adapter_state import FILE_NAME, AdapterState
from baton.proxy.group import Alone, Group
from baton.proxy.http.bodies import BodyMemory, HeldBody, read_body
from baton.proxy.http.failures import Failure
from baton.proxy.http.refusals import RefusalLog
from baton.proxy.http.unknown import UnknownParameters
from baton.proxy.interface import AppSettings, Engine
from baton.proxy.metrics.metrics import ModelMetrics, ProxyMetrics
from baton.proxy.metrics.request_log import RequestLog, Spans
from baton.proxy.routing.adapter_places import RequestAdapter
from baton.proxy.tenants.tenants import Tenant, Tenants
from baton.proxy.text.model_text import ModelText

MAX_NAMES_SHOWN = 20
"""In the error of a name that is not served."""
MOST_OF_FREE = 8
"""Of several tenants, each may have at most so many times the free places: one alone has 8 of 9, two have 8 of 17 each,
so that some are left for others (Choudhury and Hahne, "Dynamic queue length thresholds", 1998)."""


@dataclass(slots=True)
class RequestLimit:
    """Bounds how many requests are answered at once, and thereby what they hold in memory."""

    limit: int
    inside: int = 0

    def check(self) -> None:
        """Raises Overloaded while there is no place."""
        if self.inside >= self.limit:
            raise Overloaded(f"{self.limit} requests are being answered already", retry_after_s=1.0)

    def __enter__(self) -> None:
        self.check()
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1

    @property
    def free(self) -> int:
        return self.limit - self.inside


@dataclass(slots=True)
class ClientIds:
    """Ids of the requests that are being answered, which clients may choose; RequestLimit bounds their number."""

    active: set[tuple[str, str]] = field(default_factory=set)
    """With the name of the tenant: none learns of another's ids."""

    @contextmanager
    def claim(self, request_id: str, tenant: str) -> Iterator[None]:
        """Raises BadRequest (409) while another request of the tenant has this id: the client sent one twice."""
        claimed = tenant, request_id
        if claimed in self.active:
            message = "a request with this X-Request-Id is being answered already"
            raise BadRequest(message, status=409, code="request_in_progress")
        self.active.add(claimed)
        try:
            yield
        finally:
            self.active.discard(claimed)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """All that the HTTP side has of one model."""

    name: str
    """The first of its names, which engine and metrics know."""
    text: ModelText
    metrics: ModelMetrics
    named: NamedAdapter | None = None
    """Where the name that was asked for is that of an adapter of the model."""

    @property
    def adapter(self) -> RequestAdapter | None:
        return None if self.named is None else self.named.adapter


@dataclass(frozen=True, slots=True)
class Service:
    """The engine, the models by all of their names and what is measured."""

    engine: Engine
    models: Mapping[str, ModelEntry]
    adapters: AdapterNames
    adapter_changes: AdapterChanges | None
    """None: the names stay as they were at the start."""
    settings: AppSettings
    metrics: ProxyMetrics
    log: RequestLog
    refusals: RefusalLog
    limit: RequestLimit
    bodies: BodyMemory
    unknown: UnknownParameters
    client_ids: ClientIds
    group: Group
    """The other proxies at the port."""
    tenants: Tenants

    @contextmanager
    def place(self, tenant: Tenant) -> Iterator[None]:
        """Inside it, a request that has its place in `limit` counts as one of its tenant's. Raises Overloaded."""
        usage = tenant.usage
        if len(self.tenants) > 1 and usage.inside and usage.inside >= MOST_OF_FREE * self.limit.free:
            message = f"{usage.inside} requests of this key are being answered already, and the server is nearly full"
            raise usage.refused("share", message, 1.0)
        with usage.place():
            yield

    @asynccontextmanager
    async def body(self, scope: Scope, receive: Receive, tenant: Tenant) -> AsyncIterator[HeldBody]:
        """A request's whole body; it takes no place among the requests while it arrives, as slow clients would keep
        all of them."""
        self.limit.check()
        with self.bodies.hold() as held:
            await read_body(scope, receive, self.settings.max_body_bytes, held)
            with self.limit, self.place(tenant):
                yield held

    def refused(self, reason: str, failure: Failure | None) -> None:
        """A connection, or a request that has reached no route, was refused; `reason` is one of REFUSALS."""
        self.metrics.refused[reason].inc()
        if failure is not None:
            self.refusals.add(failure, "")

    @property
    def default_model(self) -> ModelEntry:
        """The first one, for what names no model."""
        return next(iter(self.models.values()))

    def models_for(self, tenant: Tenant) -> Mapping[str, ModelEntry]:
        """Those that the tenant may use, by the names under which it may."""
        adapted = {each.name: self._adapted(each) for each in self.adapters}
        return {name: model for name, model in {**self.models, **adapted}.items() if tenant.rules.may_use(name)}

    def _adapted(self, named: NamedAdapter) -> ModelEntry:
        return replace(self.models[named.parent], named=named)

    def model(self, name: str, tenant: Tenant) -> ModelEntry:
        """Raises BadRequest (404) unless `name` is served, to this tenant: it learns of no other's models."""
        found = self.models.get(name)
        if found is None and (named := self.adapters.find(name)) is not None:
            found = self._adapted(named)
        if found is None or not tenant.rules.may_use(name):
            names = [f"`{each}`" for each in islice(self.models_for(tenant), MAX_NAMES_SHOWN + 1)]
            names[MAX_NAMES_SHOWN:] = ["others"] if len(names) > MAX_NAMES_SHOWN else []
            served = ", ".join(names) or "none for this key"
            message = f"The model `{name[:128]}` does not exist; this server has {served}."
            raise BadRequest(message, status=404, param="model", code="model_not_found")
        return found

    def model_or_default(self, name: str | None, tenant: Tenant) -> ModelEntry:
        """Where a request may leave its model out, or name any: the first one of the tenant's."""
        if name and tenant.rules.may_use(name) and (name in self.models or self.adapters.find(name) is not None):
            return self.model(name, tenant)
        found = next(iter(self.models_for(tenant).values()), None)
        return found or self.model(name or "", tenant)

    def max_model_len(self, model: str) -> int:
        """Raises PeerLost while no worker of the model has registered."""
        max_model_len = self.engine.max_model_len(model)
        if not max_model_len:
            raise PeerLost(self.engine.ready() or "no worker has registered yet")
        return max_model_len


def make_service(
    engine: Engine,
    texts: Mapping[str, ModelText],
    settings: AppSettings,
    spans: Spans | None = None,
    group: Group | None = None,
    tenants: Tenants | None = None,
    adapters: AdapterNames | None = None,
) -> Service:
    """`texts` are the text sides of the models, by the first of the names that they have; without a `group`, no other
    proxy is at the port; without `tenants`, those that have a key are one."""
    names = AdapterNames((*texts, *settings.aliases)) if adapters is None else adapters
    metrics = ProxyMetrics(engine, tuple(texts), tenants=tenants or (), adapters=names)
    models = {name: ModelEntry(name, text, metrics.of(name)) for name, text in texts.items()}
    models |= dict.fromkeys(settings.aliases, next(iter(models.values())))
    log = RequestLog(slow_s=settings.slow_request_s, keep=settings.debug_requests, spans=spans)
    limit = RequestLimit(settings.max_requests)
    bodies = BodyMemory(settings.body_memory_bytes, metrics.refused["body_memory"].inc)
    unknown = UnknownParameters(refuse=settings.refuse_unknown_parameters)
    return Service(
        engine=engine,
        models=models,
        adapters=names,
        adapter_changes=_changes_of(names, next(iter(texts)), settings, group or Alone()),
        settings=settings,
        metrics=metrics,
        log=log,
        refusals=RefusalLog(),
        limit=limit,
        bodies=bodies,
        unknown=unknown,
        client_ids=ClientIds(),
        group=group or Alone(),
        tenants=tenants or Tenants.one(settings.api_keys),
    )


def _changes_of(names: AdapterNames, model: str, settings: AppSettings, group: Group) -> AdapterChanges | None:
    if (root := settings.adapter_root) is None:
        return None
    state = AdapterState(settings.adapter_state or root / FILE_NAME)
    return AdapterChanges(names, model, root.resolve(), state, group)
