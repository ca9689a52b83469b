"""Refuses requests that were sent to a name which is not this server's: DNS rebinding.

A web page may let its own name point to 127.0.0.1, and its script, which runs in a browser on this machine, then talks
to a server that needs no key. The browser still sends the page's name as Host. That is no IP address, no name below
localhost and, as pages of the internet have none, no name without a dot, so these pass. ASGI middleware without state;
it knows no keys and no routes.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.proxy.http.asgi import Reply
from baton.proxy.http.failures import Failure

ALL = "*"
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]*)?", re.ASCII)
_REFUSED = Failure(
    403,
    "the Host header is not a name of this server, which needs no key and so answers to localhost, IP addresses and "
    "names without a dot only; start it with --allowed-host NAME for a further name, or with a key",
    "invalid_request_error",
    None,
    "host_not_allowed",
)


class HostCheck:
    """Answers 403 where the Host header is neither an IP address, a local name, nor one of `allowed`."""

    def __init__(self, app: ASGIApp, allowed: Collection[str], on_refused: Callable[[Failure, str], None]) -> None:
        """`on_refused` gets the error and the path."""
        self._app = app
        self._allowed = frozenset(_normalized(name) for name in allowed)
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._accepts(Headers(scope=scope).get("host")):
            self._on_refused(_REFUSED, scope["path"])
            await Reply(send, {}).refuse(_REFUSED, scope["path"])
            return
        await self._app(scope, receive, send)

    def _accepts(self, header: str | None) -> bool:
        if header is None:
            return True  # HTTP/1.0: no browser
        if (found := _HOST.fullmatch(header.strip())) is None:
            return False
        if found[1]:
            return _is_address(found[1])
        name = _normalized(found[2])
        return name in self._allowed or _is_local(name) or _is_address(name)


def _normalized(name: str) -> str:
    return name.lower().removesuffix(".")


def _is_local(name: str) -> bool:
    return bool(name) and ("." not in name or name.endswith(".localhost"))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
