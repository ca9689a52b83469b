"""uvicorn's server with a bound on TLS handshakes: uvicorn has no option for it, and asyncio's is 60 s.

A connection whose handshake is not over is shown to no protocol, so nothing else could end it.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any

import uvicorn

HANDSHAKE_TIMEOUT_S = 10.0
"""As long as for a head."""


class BoundedServer(uvicorn.Server):
    """Serves HTTPS if `tls` is given; uvicorn itself is not to have a certificate."""

    def __init__(
        self, config: uvicorn.Config, tls: ssl.SSLContext | None, handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S
    ) -> None:
        super().__init__(config)
        self._tls: dict[str, Any] = {} if tls is None else {"ssl": tls, "ssl_handshake_timeout": handshake_timeout_s}

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # all but listening
        loop = asyncio.get_running_loop()
        for each in sockets or ():
            server = await loop.create_server(self._protocol, sock=each, backlog=self.config.backlog, **self._tls)
            self.servers.append(server)

    def _protocol(self) -> asyncio.Protocol:
        made: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        return made
