"""Errors for paths and methods that have no route: what is not here, and what is.

It owns the table of APIs of other servers that clients ask for. Knows the routes only as a list of paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from baton.proxy.http.failures import Failure

MAX_SHOWN_CHARS = 128
BATCH = "`baton batch` answers files of requests in OpenAI's batch format."
ABSENT = {
    "/v1/responses": "stored responses",
    "/v1/embeddings": "OpenAI's embeddings API",
    "/v1/audio": "OpenAI's audio API",
    "/v1/images": "OpenAI's images API",
    "/v1/videos": "OpenAI's videos API",
    "/v1/moderations": "OpenAI's moderations API",
    "/v1/batches": "OpenAI's batch API",
    "/v1/files": "OpenAI's files API",
    "/v1/uploads": "OpenAI's uploads API",
    "/v1/fine_tuning": "OpenAI's fine-tuning API",
    "/v1/assistants": "OpenAI's Assistants API",
    "/v1/threads": "OpenAI's Assistants API",
    "/v1/vector_stores": "OpenAI's vector stores API",
    "/v1/conversations": "OpenAI's Conversations API",
    "/v1/realtime": "OpenAI's Realtime API",
    "/v1/evals": "OpenAI's evals API",
    "/v1/containers": "OpenAI's containers API",
    "/v1/edits": "OpenAI's edits API",
    "/v1/engines": "OpenAI's engines API",
    "/v1/messages/batches": "Anthropic's Message Batches API",
    "/v1/complete": "Anthropic's text completions API",
    "/v1/rerank": "a rerank API",
    "/v1/score": "a score API",
    "/v2/rerank": "a rerank API",
    "/rerank": "a rerank API",
    "/score": "a score API",
    "/pooling": "a pooling API",
    "/classify": "a classification API",
    "/generate": "the generate API of other servers",
    "/api": "Ollama's API",
}
"""By the beginning of the path."""
EMBEDDINGS = "/v1/embeddings"
NO_NOTES: Mapping[str, str] = {}


def no_route(method: str, path: str, routes: Sequence[str], notes: Mapping[str, str] = NO_NOTES) -> Failure:
    """The 404 of a path; `routes` are the paths that can be offered instead, `notes` say why an API is not here, by the
    beginning of its path."""
    shown, here = path[:MAX_SHOWN_CHARS], f"It has {', '.join(routes)}."
    for wanted in (f"/v1{path}", path.removeprefix("/v1")):
        if wanted in routes:
            text = f"There is no {method} {shown}; {wanted} is meant, perhaps: check the base URL of the client."
            return _failure(404, text, "unknown_url")
    for beginning, api in ABSENT.items():
        if path == beginning or path.startswith(f"{beginning}/"):
            more = f" {BATCH}" if beginning in ("/v1/batches", "/v1/files") else notes.get(beginning, "")
            return _failure(404, f"This server does not have {api} ({method} {shown}). {here}{more}", "unsupported_api")
    return _failure(404, f"There is no {method} {shown} on this server. {here}", "unknown_url")


def embeddings_note(pooling: Mapping[str, str]) -> str:
    """Why models have no embeddings; `pooling` by name, as their folders say it."""
    said = [f"the folder of `{name}` says {rule or 'none'}" for name, rule in pooling.items()]
    return f" Embeddings need a rule of pooling: {'; '.join(said)}. No rule is computed here, models only generate."


def wrong_method(method: str, path: str, allowed: str) -> Failure:
    """The 405 of a path that is there for other methods."""
    text = f"{method} is not allowed on {path[:MAX_SHOWN_CHARS]}; use {allowed}."
    return _failure(405, text, "method_not_supported")


def _failure(status: int, message: str, code: str) -> Failure:
    return Failure(status, message, "invalid_request_error", code=code)
