"""What happens to a request before its route: paths and methods that clients write differently, CORS, compression, the
access log.

ASGI middleware without state. Keys are looked at by `guard.Guard`, which sees the path that is left here.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.node.telemetry import log_event

logger = logging.getLogger("access")

CORS_METHODS = ("GET", "HEAD", "POST", "OPTIONS")
WITHOUT_V1 = frozenset({"/completions", "/chat/completions", "/models"})
CLIENT_LEFT = 499
"""Logged where the client closed the connection before an answer began, as nginx does."""
_BEGINNING = re.compile(r"/+(v1/+)?")


class LenientPaths:
    """`//v1/models`, `/v1//models`, `/models` and `/v1/models/` are `/v1/models`: base URLs end in a slash, or lack
    their `/v1`, and clients lose their body or their key where they are sent from one to the other.
    HEAD is GET without the body, as RFC 9110 wants."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if "//" in scope["path"]:
                scope = {**scope, "path": single_slashes(scope["path"])}
            if len(scope["path"]) > 1 and scope["path"].endswith("/"):
                scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
            if scope["path"] in WITHOUT_V1:
                scope = {**scope, "path": f"/v1{scope['path']}"}
            if scope["method"] == "HEAD":
                scope, send = {**scope, "method": "GET"}, _without_body(send)
        await self._app(scope, receive, send)


def single_slashes(path: str) -> str:
    """Only at the joints of a base URL: what follows may be the name of a model that is a path."""
    beginning = _BEGINNING.match(path)
    if beginning is None:
        return path
    return ("/v1/" if beginning[1] else "/") + path[beginning.end() :]


def _without_body(send: Send) -> Send:
    async def send_head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return send_head


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether the header names gzip, or all encodings, with a weight above zero."""
    for part in accept_encoding.lower().split(","):
        name, _, weight = (word.strip() for word in part.partition(";"))
        if name in ("gzip", "*"):
            return not re.fullmatch(r"q=0(\.0*)?", weight)
    return False


class AccessLog:
    """One line a request: method, path, status, milliseconds until its end, id. No query, no header, no body."""

    def __init__(self, app: ASGIApp, clock: Callable[[], float] = time.perf_counter) -> None:
        self._app = app
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s, status, request_id = self._clock(), CLIENT_LEFT, ""

        async def watch(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                found = [value for name, value in message.get("headers", ()) if name == b"x-request-id"]
                request_id = found[0].decode("latin-1") if found else ""
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            status = 500 if status == CLIENT_LEFT else status
            raise
        finally:
            log_event(
                logger,
                "access",
                level=logging.INFO,
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(1000 * (self._clock() - began_s), 1),
                **({"request_id": request_id} if request_id else {}),
            )
