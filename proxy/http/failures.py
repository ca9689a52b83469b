"""Errors as HTTP: the one place that turns an exception into a status code and OpenAI's error body.

Source: the OpenAI API reference, "Error codes"; the `openai` client picks its exception by the status.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from baton.node.errors import BadRequest, DeadlineExceeded, Overloaded, PeerLost, TransferFailed
from baton.node.telemetry import excerpt

MAX_MESSAGE_CHARS, MAX_PARAM_CHARS = 1000, 200
"""Both may quote the request."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as its client sees it."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float = 0.0
    """0: no Retry-After header."""

    @property
    def headers(self) -> dict[str, str]:
        if not self.retry_after_s:
            return {}
        return {"retry-after": str(max(1, math.ceil(self.retry_after_s)))}

    def body(self) -> bytes:
        """The JSON body; as the data of an event it also ends a stream, as the client raises on its "error" key."""
        param = self.param if self.param is None else excerpt(self.param, MAX_PARAM_CHARS)
        message = excerpt(self.message, MAX_MESSAGE_CHARS)
        error = {"message": message, "type": self.type, "param": param, "code": self.code}
        return msgspec.json.encode({"error": error})


def failure_of(error: BaseException) -> Failure:
    """`error` as the client sees it; without details where the client did not cause it."""
    match error:
        case BadRequest():
            return Failure(error.status, str(error), "invalid_request_error", error.param, error.code)
        case Overloaded():
            after = max(error.retry_after_s, 1.0)
            if error.status == 429:
                return Failure(429, str(error), "rate_limit_error", None, "rate_limit_exceeded", after)
            return Failure(error.status, str(error), "server_error", None, "service_unavailable", after)
        case PeerLost() | TransferFailed():
            return Failure(503, str(error), "server_error", None, "service_unavailable", 1.0)
        case DeadlineExceeded() | TimeoutError():
            return Failure(504, str(error) or "the request's time is up", "server_error", None, "timeout")
        case _:
            return Failure(500, "the server failed to answer this request", "server_error", None, "internal_error")


def kind_of(error: BaseException) -> str:
    """The failure's label in the metrics; one of FAILURE_KINDS."""
    match error:
        case BadRequest():
            return "bad_request"
        case Overloaded():
            return "overloaded"
        case PeerLost() | TransferFailed():
            return "peer_lost"
        case DeadlineExceeded() | TimeoutError():
            return "deadline"
        case _:
            return "internal"


FAILURE_KINDS = ("bad_request", "overloaded", "peer_lost", "deadline", "internal", "disconnected", "slow_reader")
