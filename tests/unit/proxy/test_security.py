"""Kinds of faults that other servers of language models had, tried on the app: each test names the advisory.

SECURITY.md lists them all, with the tests of other rooms that show the others.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message

from baton.proxy.http.app import create_app
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText
from baton.proxy.text.template import NEXT_MESSAGE
from baton.testing.fake_engine import EngineCall, FakeEngine, ScriptStep

COMPLETION = {"model": "demo", "prompt": "Once", "max_tokens": 4}
LEAK = re.compile(r"0x[0-9a-f]{6,}|object at 0x|Traceback|site-packages|\.py\b|/proxy/|/usr/|/home/")


async def raw(app: object, method: str, path: str, headers: Mapping[str, str] = {}) -> int:
    """The status of a request that no client library has tidied."""
    statuses: list[int] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("192.0.2.1", 1),
        "server": ("127.0.0.1", 8000),
    }
    await app(scope, receive, send)  # type: ignore[operator]
    return statuses[0]


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "proxy/health"},
        {"host": "proxy/health?"},
        {"host": "proxy/health#"},
        {"host": "a@proxy:80/live#"},
        {"x-forwarded-prefix": "/health", "x-original-url": "/health", "x-rewrite-url": "/live"},
        {"x-http-method-override": "OPTIONS"},
        {"forwarded": "for=127.0.0.1", "x-forwarded-for": "127.0.0.1", "x-real-ip": "127.0.0.1"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer \x00secret"},
        {"authorization": "Bearer secre"},
    ],
)
async def test_no_header_stands_for_a_key(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings, headers: Mapping[str, str]
) -> None:
    """CVE-2026-48746: the guard read the path from a URL that was made of the Host header."""
    app = create_app(engine, {"demo": text}, replace(app_settings, api_keys=("secret",)))
    for path in ("/v1/models", "/v1/completions", "/metrics", "/tokenize"):
        assert await raw(app, "POST" if "v1/c" in path or "tok" in path else "GET", path, headers) == 401, path


@pytest.mark.parametrize(
    "path",
    [
        "/health/../v1/models",
        "/health/..;/v1/models",
        "/v1/models/health",
        "/v1/models//health",
        "/v1/models?x=/health",
        "/health%2f..%2fv1/models",
        "/metrics/",
        "/metrics/dashboard",
        "//metrics",
        "/dashboard/../metrics",
        "/dashboard/metrics",
        "/Health",
        "/health ",
        "/health\x00",
        "*",
        "",
    ],
)
async def test_no_path_is_a_guarded_one_for_the_router_and_an_open_one_for_the_guard(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings, path: str
) -> None:
    """CVE-2026-48746, and every proxy whose two halves read a path differently."""
    app = create_app(engine, {"demo": text}, replace(app_settings, api_keys=("secret",)))
    for method in ("GET", "HEAD", "POST", "get"):
        assert await raw(app, method, path) == 401, method


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b'{"model": "demo", "prompt": {"a": 1}}',
    b'{"model": "demo", "prompt": "x", "max_tokens": "x"}',
    b'{"model": "demo", "prompt": [4294967296]}',
    b'{"model": "../../etc/passwd", "prompt": "x"}',
    b'{"model": "demo", "prompt": "x", "logit_bias": {"x": "y"}}',
    b'{"model": "demo", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    b'{"model": "demo", "messages": [{"role": "assistant"}], "continue_final_message": true}',
    b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"__class__": 1}}',
    b'{"model": "demo", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 1}}',
    b'{"model": "demo", "max_tokens": 4, "messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}',
    b'{"model": "demo", "max_tokens": 4, "messages": [{"role": "user", "content": "x"}], "tools": [{"name": {}}]}',
    b'{"tokens": [-1]}',
]


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/messages/count_tokens"),
        *("/tokenize", "/detokenize"),
    ],
)
async def test_no_error_shows_an_address_or_a_path(client: httpx.AsyncClient, path: str) -> None:
    """CVE-2026-22778 sent an object's address to the client, CVE-2026-73555 the server's paths, CVE-2025-23320 the
    name of a shared memory."""
    for content in BAD_BODIES:
        answer = await client.post(path, content=content)
        assert answer.status_code < 500, content
        assert not LEAK.search(answer.text), answer.text


async def test_no_failure_of_the_engine_shows_its_cause(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    """As above, where the fault is the server's own."""

    def broken(call: EngineCall) -> list[ScriptStep]:
        return [ValueError(f"{object()} in {__file__}")]

    engine.script = broken
    for body in (COMPLETION, {**COMPLETION, "stream": True}):
        answer = await client.post("/v1/completions", json=body)
        assert "the server failed" in answer.text and not LEAK.search(answer.text)


async def test_no_id_of_a_client_is_more_than_one_value_of_a_log_line(
    client: httpx.AsyncClient, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards those who read the log from fields, and from whole lines, that a client wrote."""
    engine.script = lambda _: [ValueError("a bug")]
    headers = {"x-request-id": 'x level="INFO" status=200'}
    await client.post("/v1/completions", json=COMPLETION, headers=headers)
    (line,) = [record.getMessage() for record in caplog.records if "request_failed" in record.getMessage()]
    assert line == r'request_failed request_id="x level=\"INFO\" status=200"'


async def series(client: httpx.AsyncClient) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """Every series of /metrics, by name and labels."""
    families = text_string_to_metric_families((await client.get("/metrics")).text)
    return {(sample.name, frozenset(sample.labels.items())) for family in families for sample in family.samples}


async def test_no_client_adds_a_series_to_the_metrics(client: httpx.AsyncClient) -> None:
    """CVE-2026-105759: each method that a client invented was a label, and the memory of the server grew with them."""
    await client.post("/v1/completions", json=COMPLETION)
    before = await series(client)
    for n, letter in enumerate(string.ascii_uppercase):
        await client.request(letter * 7, f"/v1/{letter}", headers={"x-request-id": letter, "user-agent": letter})
        await client.post("/v1/completions", json={**COMPLETION, "model": letter, f"unknown{n}": 1})
        await client.post("/v1/completions", json={**COMPLETION, "user": letter, "cache_salt": letter, "seed": n})
    assert await series(client) == before


async def test_a_message_is_no_template(text: ModelText) -> None:
    """CVE-2026-5760 and its kind: what is rendered twice runs what a client wrote."""
    written = "{{ 7 * 7 }}{% for x in range(9) %}x{% endfor %}{{ ''.__class__ }}"
    prompt = await text.render_bounded([{"role": "user", "content": written}], NEXT_MESSAGE)
    assert written in prompt


@pytest.mark.parametrize(
    "variable", ["messages", "tools", "raise_exception", "tokenize", "chat_template", "a.b", "a b"]
)
async def test_no_variable_of_a_request_replaces_what_a_template_relies_on(
    client: httpx.AsyncClient, variable: str
) -> None:
    """CVE-2025-62426: a variable of the template was also an argument of the function that renders it."""
    chat = {"model": "demo", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {variable: True}}
    answer = await client.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"chat_template_kwargs.{variable}"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": "http://127.0.0.1:5570/"}},
        {"type": "video_url", "video_url": {"url": "http://127.0.0.1:5570/"}},
        {"type": "file", "file": {"file_id": "../../etc/passwd"}},
    ],
)
async def test_no_medium_is_fetched_or_decoded(
    client: httpx.AsyncClient, engine: FakeEngine, part: Mapping[str, object]
) -> None:
    """CVE-2025-6242, CVE-2026-24779 and CVE-2026-73560 fetched URLs of prompts; CVE-2026-22778 decoded their media."""
    chat = {"model": "demo", "messages": [{"role": "user", "content": [part]}]}
    assert (await client.post("/v1/chat/completions", json=chat)).status_code == 400
    assert engine.calls == []
