"""Errors in the shape of Anthropic's API, whose clients choose their exception by the status and the type.

Knows no exceptions: see `failures`. Source: the Anthropic API reference, "Errors".
"""

from __future__ import annotations

import msgspec

from baton.node.telemetry import excerpt
from baton.proxy.http.failures import MAX_MESSAGE_CHARS, Failure

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def error_json(failure: Failure) -> bytes:
    """A whole answer, or the data of a stream's last event."""
    kind = _TYPES.get(failure.status) or ("api_error" if failure.status >= 500 else "invalid_request_error")
    # Agents shorten their conversation where they read these words.
    begins = "prompt is too long: " if failure.code == "context_length_exceeded" else ""
    error = {"type": kind, "message": begins + excerpt(failure.message, MAX_MESSAGE_CHARS)}
    return msgspec.json.encode({"type": "error", "error": error})
