"""What all requests of one app share. Knows no HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from baton.node.errors import BadRequest, Overloaded, PeerLost
from baton.proxy.group import Alone, Group
from baton.proxy.http.refusals import RefusalLog
from baton.proxy.http.unknown import UnknownParameters
from baton.proxy.interface import AppSettings, Engine
from baton.proxy.metrics.metrics import ModelMetrics, ProxyMetrics
from baton.proxy.metrics.request_log import RequestLog, Spans
from baton.proxy.text.model_text import ModelText


@dataclass(slots=True)
class RequestLimit:
    """Bounds how many requests are answered at once, and thereby what they hold in memory."""

    limit: int
    inside: int = 0

    def __enter__(self) -> None:
        if self.inside >= self.limit:
            raise Overloaded(f"{self.limit} requests are being answered already", retry_after_s=1.0)
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


@dataclass(slots=True)
class ClientIds:
    """Ids of the requests that are being answered, which clients may choose; RequestLimit bounds their number."""

    active: set[str] = field(default_factory=set)

    @contextmanager
    def claim(self, request_id: str) -> Iterator[None]:
        """Raises BadRequest (409) while another request has this id: the client sent one twice."""
        if request_id in self.active:
            message = "a request with this X-Request-Id is being answered already"
            raise BadRequest(message, status=409, code="request_in_progress")
        self.active.add(request_id)
        try:
            yield
        finally:
            self.active.discard(request_id)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """All that the HTTP side has of one model."""

    name: str
    """The first of its names, which engine and metrics know."""
    text: ModelText
    metrics: ModelMetrics


@dataclass(frozen=True, slots=True)
class Service:
    """The engine, the models by all of their names and what is measured."""

    engine: Engine
    models: Mapping[str, ModelEntry]
    settings: AppSettings
    metrics: ProxyMetrics
    log: RequestLog
    refusals: RefusalLog
    limit: RequestLimit
    unknown: UnknownParameters
    client_ids: ClientIds
    group: Group
    """The other proxies at the port."""

    @property
    def default_model(self) -> ModelEntry:
        """The first one, for what names no model."""
        return next(iter(self.models.values()))

    def model(self, name: str) -> ModelEntry:
        """Raises BadRequest (404) unless `name` is served."""
        found = self.models.get(name)
        if found is None:
            served = ", ".join(f"`{each}`" for each in self.models)
            message = f"The model `{name[:128]}` does not exist; this server has {served}."
            raise BadRequest(message, status=404, param="model", code="model_not_found")
        return found

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
) -> Service:
    """`texts` are the text sides of the models, by the first of the names that they have; without a `group`, no other
    proxy is at the port."""
    metrics = ProxyMetrics(engine, tuple(texts))
    models = {name: ModelEntry(name, text, metrics.of(name)) for name, text in texts.items()}
    models |= dict.fromkeys(settings.aliases, next(iter(models.values())))
    log = RequestLog(slow_s=settings.slow_request_s, keep=settings.debug_requests, spans=spans)
    limit = RequestLimit(settings.max_requests)
    unknown = UnknownParameters(refuse=settings.refuse_unknown_parameters)
    return Service(engine, models, settings, metrics, log, RefusalLog(), limit, unknown, ClientIds(), group or Alone())
