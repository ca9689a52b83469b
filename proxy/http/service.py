"""What all requests of one app share. Knows no HTTP."""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.errors import BadRequest, Overloaded, PeerLost
from baton.proxy.interface import AppSettings, Engine
from baton.proxy.metrics.metrics import ProxyMetrics
from baton.proxy.metrics.request_log import RequestLog
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


@dataclass(frozen=True, slots=True)
class Service:
    """The engine, the model's text side and what is measured."""

    engine: Engine
    text: ModelText
    settings: AppSettings
    metrics: ProxyMetrics
    log: RequestLog
    limit: RequestLimit

    def check_model(self, name: str) -> None:
        """Raises BadRequest (404) unless `name` is the model that is served."""
        if name != self.settings.served_model_name:
            message = f"The model `{name[:128]}` does not exist; this server has `{self.settings.served_model_name}`."
            raise BadRequest(message, status=404, param="model", code="model_not_found")

    def max_model_len(self) -> int:
        """Raises PeerLost while no worker has registered."""
        if not self.engine.max_model_len:
            raise PeerLost(self.engine.ready() or "no worker has registered yet")
        return self.engine.max_model_len
