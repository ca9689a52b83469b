"""The bodies of errors that come in place of an answer, each in the shape of the API whose path was asked for.

A stream that has begun ends with an error of its encoder instead. Knows no exceptions: see `failures`.
"""

from __future__ import annotations

from baton.proxy.http.anthropic.errors import error_json
from baton.proxy.http.failures import Failure

MESSAGES = "/v1/messages"


def error_body(failure: Failure, path: str) -> bytes:
    """OpenAI's APIs have one shape; paths without an API get it too."""
    is_anthropic = path == MESSAGES or path.startswith(f"{MESSAGES}/")
    return error_json(failure) if is_anthropic else failure.body()
