"""Requests that are refused: an error for the client, and a line in the log, few of them a second.

It owns the handlers of the routes that FastAPI serves; endpoints that generate answer by themselves. Neither texts of
prompts nor keys are logged.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from baton.node.errors import BatonError
from baton.node.telemetry import log_event
from baton.proxy.http.absent import NO_NOTES, no_route, wrong_method
from baton.proxy.http.asgi import ClientGone
from baton.proxy.http.error_bodies import error_body
from baton.proxy.http.failures import Failure, failure_of, kind_of
from baton.proxy.metrics.metrics import ProxyMetrics

logger = logging.getLogger(__name__)

LOG_EVERY_S = 1.0
MAX_LOGGED_CHARS = 64
"""Of what the client chose: a parameter's name, a path."""
INTERNAL = 500


class RefusalLog:
    """One line a second for each status and code; each line says how many of its kind were left out before it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left_out: dict[tuple[int, str], int] = {}
        self._next_s: dict[tuple[int, str], float] = {}

    def add(self, failure: Failure, path: str, request_id: str = "") -> None:
        """The messages of a client's own faults may quote its request, so they are not logged; others are our own."""
        kind = (failure.status, failure.code or failure.type)
        now_s = self._clock()
        if now_s < self._next_s.get(kind, -math.inf):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return
        self._next_s[kind] = now_s + LOG_EVERY_S
        log_event(
            logger,
            "request_refused",
            level=logging.INFO,
            status=failure.status,
            code=kind[1],
            **({"param": failure.param[:MAX_LOGGED_CHARS]} if failure.param else {}),
            **({"reason": failure.message} if failure.status in (429, 503, 504) else {}),
            path=path[:MAX_LOGGED_CHARS],
            **({"request_id": request_id} if request_id else {}),
            left_out=self._left_out.pop(kind, 0),
        )


def add_failure_handlers(
    app: FastAPI, metrics: ProxyMetrics, log: RefusalLog, notes: Mapping[str, str] = NO_NOTES
) -> None:
    """Errors of the app's routes, and of paths that have none: `notes` as `no_route` has them. A traceback goes to the
    server's log only."""

    def failed(request: Request, failure: Failure, headers: object = None) -> Response:
        if failure.status != INTERNAL:
            log.add(failure, request.url.path)
        more = dict(headers) if isinstance(headers, dict) else {}
        body = error_body(failure, request.url.path)
        return Response(body, failure.status, {**more, **failure.headers}, "application/json")

    async def known(request: Request, error: Exception) -> Response:
        metrics.failed[kind_of(error)].inc()
        return failed(request, failure_of(error))

    async def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        method, path = request.method, request.url.path
        if error.status_code == 404:
            return failed(request, no_route(method, path, _offered(app), notes))
        if error.status_code == 405:
            return failed(request, wrong_method(method, path, (error.headers or {}).get("Allow", "")), error.headers)
        failure = Failure(error.status_code, str(error.detail), "invalid_request_error")
        return failed(request, failure, error.headers)

    async def client_gone(_: Request, error: Exception) -> Response:
        metrics.failed["disconnected"].inc()
        return Response(status_code=400)  # the connection is closed

    app.add_exception_handler(BatonError, known)
    app.add_exception_handler(TimeoutError, known)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(ClientGone, client_gone)
    app.add_exception_handler(Exception, known)


def _offered(app: FastAPI) -> list[str]:
    """Paths of APIs, as against probes, metrics and pages."""
    routes = [(getattr(route, "path", ""), getattr(route, "methods", None) or ()) for route in app.routes]
    return sorted({path for path, methods in routes if "{" not in path and ("POST" in methods or path[:4] == "/v1/")})
