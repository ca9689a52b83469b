"""A server to send requests to: a private one that is started, or one that runs already, with a client of it.

Owns the way from a model's name to a server that gives tokens, and the end of what was started. Knows no prompts.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Coroutine, Mapping
from typing import Any, TypeVar

import msgspec

from baton.node.errors import SettingsError
from baton.offline.client import ApiClient, LoopThread, NoAnswer
from baton.offline.outputs import failure_message
from baton.offline.server import PrivateServer, strings

T = TypeVar("T")

REQUEST_TIMEOUT_S = 3600.0
"""Of one request, by default: no user waits for a single answer."""
ANSWER_GRACE_S = 30.0
"""The server ends a request at its deadline; so much later the client does."""
START_TIMEOUT_S = 600.0
READY_POLL_S = 0.1
ROWS_PER_WORKER = 256
"""Requests in flight for each decode worker: as many as one on a GPU computes in a step, unless its settings differ."""
MAX_IN_FLIGHT = 1000
"""The proxy answers so many requests at once, and a few probes."""


class _ServedModel(msgspec.Struct):
    id: str
    max_model_len: int = 0


class _ModelList(msgspec.Struct):
    data: list[_ServedModel]


class ServerConnection:
    """One server and its client. What was started ends with `close`, with this object, and with this process.

    With `base_url` nothing is started, and `model` is the name of one of that server's models, by default its first;
    without it, `model` and `settings` are those of `serve`. Raises SettingsError where the server does not start or
    cannot be reached, TypeError for an unknown setting.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "",
        api_key: str = "",
        max_in_flight: int | None = None,
        request_timeout_s: float = REQUEST_TIMEOUT_S,
        settings: Mapping[str, Any],
    ) -> None:
        if base_url and settings:
            raise TypeError(f"{next(iter(settings))!r} is a setting of a server that is started; base_url names one")
        if not base_url and (not model or api_key):
            raise TypeError("model is missing" if not model else "api_key belongs to base_url")
        if max_in_flight is not None and max_in_flight < 1:
            raise ValueError(f"max_in_flight must be at least 1, not {max_in_flight}")
        self.max_in_flight = max_in_flight or min(num_rows(settings), MAX_IN_FLIGHT)
        server = None if base_url else PrivateServer(model, settings, request_timeout_s)
        url, key, ended = (server.url, server.api_key, server.ended) if server else (base_url, api_key, lambda: "")
        self._loop = LoopThread("baton-client")
        client: ApiClient | None = None
        try:
            self.client = client = ApiClient(url, key, request_timeout_s + ANSWER_GRACE_S, ended)
            if server is not None:
                self._wait_ready(server, float(settings.get("start_timeout_s", START_TIMEOUT_S)))
            served = self._served_model(model if base_url else "")
        except BaseException:
            _close(os.getpid(), self._loop, client, server)
            raise
        self.model = served.id
        """Its name in requests."""
        self.max_model_len = served.max_model_len
        """Tokens of prompt and answer together."""
        self._finalizer = weakref.finalize(self, _close, os.getpid(), self._loop, client, server)

    def close(self) -> None:
        """End what was started. A second call does nothing."""
        self._finalizer()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work` on the client's event loop. Ctrl-C cancels it."""
        return self._loop.run(work)

    def get(self, path: str) -> bytes:
        """The body of an answer with status 200; raises SettingsError."""
        try:
            answer = self.run(self.client.get(path))
        except NoAnswer as error:
            raise SettingsError(str(error)) from None
        if answer.status != 200:
            raise SettingsError(failure_message(answer.status, answer.body))
        return answer.body

    def _wait_ready(self, server: PrivateServer, timeout_s: float) -> None:
        """Until a token has come through all processes."""
        deadline_s = time.monotonic() + timeout_s

        async def ready() -> bool:
            try:
                return (await self.client.get("/health_generate")).status == 200
            except NoAnswer:
                return False

        while not self.run(ready()):
            if reason := server.ended():
                raise SettingsError(reason)
            if time.monotonic() > deadline_s:
                raise SettingsError(f"the server is not ready after {timeout_s:g} s:\n{server.tail()}")
            time.sleep(READY_POLL_S)

    def _served_model(self, name: str) -> _ServedModel:
        served = msgspec.json.decode(self.get("/v1/models"), type=_ModelList).data
        found = [model for model in served if name in ("", model.id)]
        if not found:
            raise SettingsError(f"no model {name!r} there, but {', '.join(model.id for model in served) or 'none'}")
        return found[0]


def num_rows(settings: Mapping[str, Any]) -> int:
    """Sequences that the decode workers of `serve` compute at once with these settings, as far as those say it."""
    arguments = [part for name in ("worker_arg", "decode_arg") for part in strings(settings.get(name, ()))]
    rows = int(settings.get("max_num_seqs") or ROWS_PER_WORKER)
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--max-num-seqs" and value.isdecimal():
            rows = max(1, int(value))
    return rows * int(settings.get("decode", 1))


def _close(pid: int, loop: LoopThread, client: ApiClient | None, server: PrivateServer | None) -> None:
    """End the connections, their thread, and the processes. No method, as it must not keep its object alive."""
    if os.getpid() != pid:  # a fork has neither the thread nor the children
        return
    loop.close(client.close if client else lambda: None)
    if server is not None:
        server.close()
