"""What requests meet before and beside the routes: odd paths, HEAD, CORS, gzip, APIs that are not here, the logs."""

from __future__ import annotations

import gzip
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace

import httpx
import pytest

from baton.node.errors import Overloaded, PeerLost
from baton.proxy.http.app import create_app
from baton.proxy.http.failures import Failure
from baton.proxy.http.front import accepts_gzip, single_slashes
from baton.proxy.http.refusals import RefusalLog
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine

SECRET = "my secret prompt"
COMPLETION = {"model": "demo", "prompt": SECRET}
PREFLIGHT = {
    "origin": "https://chat.example.com",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization, content-type",
}


@pytest.fixture
async def front(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Clients of a server with keys, CORS for one origin and an access log: one with a key, one without."""
    settings = replace(app_settings, api_keys=("key",), cors_origins=("https://chat.example.com",), access_log=True)
    transport = httpx.ASGITransport(create_app(engine, {"demo": text}, settings), raise_app_exceptions=False)
    headers = {"authorization": "Bearer key"}
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://proxy", headers=headers) as client,
        httpx.AsyncClient(transport=transport, base_url="http://proxy") as stranger,
    ):
        yield client, stranger


@pytest.fixture
def log_of(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log, in which no text of a prompt and no key may be."""
    caplog.set_level(logging.INFO)
    yield caplog
    assert SECRET not in caplog.text and "Bearer" not in caplog.text and "key-" not in caplog.text


# ---- paths and methods --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("//v1/completions", "/v1/completions"),
        ("/v1//completions", "/v1/completions"),
        ("///v1///chat/completions", "/v1/chat/completions"),
        ("//health", "/health"),
        ("/v1/models//srv/model", "/v1/models//srv/model"),
        ("//v1x//y", "/v1x//y"),
        ("//", "/"),
    ],
)
def test_slashes_at_the_joints_of_a_base_url(path: str, meant: str) -> None:
    """Guards against a base URL with a slash at its end that fails, and a model whose name is a path cut short."""
    assert single_slashes(path) == meant


async def test_a_doubled_slash_reaches_its_route_behind_the_key(
    front: tuple[httpx.AsyncClient, httpx.AsyncClient],
) -> None:
    """Guards against a refused client, and against a path spelled so that the key is not asked for."""
    client, stranger = front
    assert (await client.post("http://proxy//v1/completions", json=COMPLETION)).status_code == 200
    assert (await stranger.post("http://proxy//v1/completions", json=COMPLETION)).status_code == 401
    assert (await stranger.get("http://proxy//health")).status_code == 200
    assert (await stranger.get("http://proxy//health/../v1/models")).status_code != 200


async def test_a_base_url_without_v1(front: tuple[httpx.AsyncClient, httpx.AsyncClient]) -> None:
    """Guards against the most frequent mistake in a client's settings, and against a way around the key; and against
    sending a client to a path without its last slash, which takes its body or its key from it."""
    client, stranger = front
    assert (await client.get("/models")).json() == (await client.get("/v1/models")).json()
    for path in ("/completions", "http://proxy//completions", "/v1/completions/", "/completions/"):
        assert (await client.post(path, json=COMPLETION)).status_code == 200
        assert (await stranger.post(path, json=COMPLETION)).status_code == 401


async def test_head_is_get_without_a_body(client: httpx.AsyncClient) -> None:
    """Guards against a load balancer that probes with HEAD and takes the server for dead."""
    for path in ("/health", "/live", "/ready", "/v1/models", "/metrics", "/version", "/dashboard"):
        answer = await client.head(path)
        assert (answer.status_code, answer.content) == (200, b""), path
    assert int(answer.headers["content-length"]) > 0
    assert (await client.head("/v1/completions")).status_code == 405
    assert (await client.head("/nope")).status_code == 404


# ---- CORS ---------------------------------------------------------------------------------------------------------


async def test_a_page_of_an_allowed_origin_can_use_the_api(front: tuple[httpx.AsyncClient, httpx.AsyncClient]) -> None:
    """Guards against a preflight, which has no key, stopped by the key's guard, and answers a page cannot read."""
    client, stranger = front
    asked = await stranger.options("/v1/chat/completions", headers=PREFLIGHT)
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://chat.example.com"
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert "authorization" in asked.headers["access-control-allow-headers"]
    for sender, status in ((client, 200), (stranger, 401)):
        answer = await sender.post("/v1/completions", json=COMPLETION, headers={"origin": PREFLIGHT["origin"]})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "https://chat.example.com"
        assert answer.headers["access-control-expose-headers"] == "*"


async def test_other_origins_are_not_allowed(front: tuple[httpx.AsyncClient, httpx.AsyncClient]) -> None:
    """Guards against any page that a user visits reading answers with that user's key."""
    client, stranger = front
    asked = await stranger.options("/v1/completions", headers={**PREFLIGHT, "origin": "https://evil.example"})
    answer = await client.get("/v1/models", headers={"origin": "https://evil.example"})
    assert asked.status_code == 400
    assert "access-control-allow-origin" not in {*asked.headers, *answer.headers}


async def test_all_origins_and_none(engine: FakeEngine, text: ModelText, client: httpx.AsyncClient) -> None:
    """Guards against headers of CORS where none were asked for, and a star that allows nothing."""
    assert (
        "access-control-allow-origin" not in (await client.get("/v1/models", headers={"origin": "https://x"})).headers
    )
    assert (await client.options("/v1/completions", headers=PREFLIGHT)).status_code == 405
    app = create_app(engine, {"demo": text}, AppSettings(cors_origins=("*",)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as any_page:
        answer = await any_page.get("/v1/models", headers={"origin": "https://x"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert (await any_page.options("/v1/models", headers=PREFLIGHT)).status_code == 200


# ---- gzip ---------------------------------------------------------------------------------------------------------


async def test_metrics_are_compressed_where_that_is_accepted(client: httpx.AsyncClient) -> None:
    """Guards against hundreds of kilobytes a scrape, and bytes that a scraper cannot read."""
    async with client.stream("GET", "/metrics", headers={"accept-encoding": "gzip"}) as answer:
        packed = b"".join([part async for part in answer.aiter_raw()])
    plain = await client.get("/metrics", headers={"accept-encoding": "identity"})
    assert (answer.headers["content-encoding"], answer.headers["vary"]) == ("gzip", "accept-encoding")
    assert "content-encoding" not in plain.headers
    assert gzip.decompress(packed).splitlines()[0] == plain.content.splitlines()[0]
    assert len(packed) < len(plain.content) / 4


@pytest.mark.parametrize(
    ("header", "accepted"),
    [
        ("gzip", True),
        ("deflate, GZIP;q=0.5", True),
        ("*", True),
        ("", False),
        ("identity", False),
        ("gzip;q=0", False),
        ("gzip; q=0.000, *", False),
        ("xgzip", False),
    ],
)
def test_accept_encoding(header: str, accepted: bool) -> None:
    """Guards against an encoding that the client has excluded."""
    assert accepts_gzip(header) is accepted


# ---- what is not here ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("/v1/embeddings", "embeddings"),
        ("/v1/embeddings", "the folder of `demo` says none"),
        ("/v1/responses/resp_1/cancel", "stored responses"),
        ("/v1/audio/transcriptions", "audio"),
        ("/v1/images/generations", "images"),
        ("/v1/files", "`baton batch`"),
        ("/v1/batches/b1/cancel", "`baton batch`"),
        ("/v1/moderations", "moderations"),
        ("/v1/complete", "Anthropic"),
        ("/api/chat", "Ollama"),
    ],
)
async def test_an_api_that_is_not_here_is_named(client: httpx.AsyncClient, path: str, named: str) -> None:
    """Guards against a bare "Not Found", after which a user looks for a wrong URL."""
    answer = await client.post(path, json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (404, "invalid_request_error", "unsupported_api")
    assert named in error["message"] and path in error["message"]
    assert all(here in error["message"] for here in ("/v1/chat/completions", "/v1/completions", "/v1/models"))


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/tokenize", "/tokenize"),
    ],
)
async def test_a_wrong_base_url_is_named(client: httpx.AsyncClient, path: str, meant: str) -> None:
    """Guards against a frequent mistake, a base URL with /v1 twice or where there is none, left to the user to find."""
    error = (await client.post(path, json={})).json()["error"]
    assert error["code"] == "unknown_url" and f"{meant} is meant" in error["message"]


async def test_other_paths_and_methods(client: httpx.AsyncClient) -> None:
    """Guards against an endless path in an error, and a 405 that does not say which method is right."""
    error = (await client.get("/" + "x" * 5000)).json()["error"]
    assert error["code"] == "unknown_url" and len(error["message"]) < 1000
    assert "/v1/embeddingsx" in (await client.get("/v1/embeddingsx")).json()["error"]["message"]
    answer = await client.get("/v1/completions")
    error = answer.json()["error"]
    assert (answer.status_code, answer.headers["allow"], error["code"]) == (405, "POST", "method_not_supported")
    assert error["message"] == "GET is not allowed on /v1/completions; use POST."
    assert set(error) == {"message", "type", "param", "code"}


# ---- logs ---------------------------------------------------------------------------------------------------------


def test_refused_requests_are_one_line_a_second_of_each_kind(log_of: pytest.LogCaptureFixture) -> None:
    """Guards against a log that one wrong client fills, against refusals that are not seen, and a lost count."""
    now_s = 0.0
    log = RefusalLog(lambda: now_s)
    bad = Failure(400, f"{SECRET} is wrong", "invalid_request_error", "prompt", None)
    for _ in range(1000):
        log.add(bad, "/v1/completions", "id-1")
    log.add(Failure(429, "512 requests wait", "rate_limit_error", None, "rate_limit_exceeded"), "/v1/completions")
    assert log_of.messages == [
        "request_refused status=400 code=invalid_request_error param=prompt path=/v1/completions request_id=id-1 "
        "left_out=0",
        'request_refused status=429 code=rate_limit_exceeded reason="512 requests wait" path=/v1/completions '
        "left_out=0",
    ]
    now_s = 1.0
    log.add(bad, "/v1/completions")
    log.add(bad, "/v1/completions")
    assert log_of.messages[2:] == [
        "request_refused status=400 code=invalid_request_error param=prompt path=/v1/completions left_out=999"
    ]


async def test_every_refusal_is_logged(
    front: tuple[httpx.AsyncClient, httpx.AsyncClient], engine: FakeEngine, log_of: pytest.LogCaptureFixture
) -> None:
    """Guards against a kind of refusal that an operator cannot see."""
    client, stranger = front
    answer = await client.post("/v1/completions", json={**COMPLETION, "n": 1000})
    await client.post("/v1/completions", json={**COMPLETION, "model": SECRET})
    await stranger.get("/v1/models", headers={"authorization": "Bearer key-of-no-client"})
    await client.get("/v1/nope")
    await client.get("/v1/completions")
    await client.post("/tokenize", json={})
    engine.script = lambda call: [PeerLost("no decode worker")]
    await client.post("/v1/completions", json=COMPLETION)
    engine.script = lambda call: [Overloaded("the queue is full")]
    await client.post("/v1/completions", json=COMPLETION)
    refused = [line for line in log_of.messages if line.startswith("request_refused")]
    assert [line.split()[1] for line in refused] == [f"status={n}" for n in (400, 404, 401, 404, 405, 503, 429)]
    assert f"param=n path=/v1/completions request_id={answer.headers['x-request-id']}" in refused[0]
    assert 'reason="no decode worker"' in refused[5]


async def test_the_access_log_is_a_line_a_request(
    front: tuple[httpx.AsyncClient, httpx.AsyncClient], engine: FakeEngine, log_of: pytest.LogCaptureFixture
) -> None:
    """Guards against a request without a line, and a key or a prompt in one."""
    client, stranger = front
    done = await client.post("/v1/completions?prompt=my+secret+prompt", json=COMPLETION)
    stream = await client.post("/v1/completions", json={**COMPLETION, "stream": True})
    await client.head("http://proxy//health")
    await stranger.get("/v1/models")
    engine.totals = {"broken": "no number"}  # type: ignore[dict-item]
    await client.get("/metrics")
    access = [line.split() for line in log_of.messages if line.startswith("access ")]
    assert [(words[1:4], words[5:]) for words in access] == [
        (["method=POST", "path=/v1/completions", "status=200"], [f"request_id={done.headers['x-request-id']}"]),
        (["method=POST", "path=/v1/completions", "status=200"], [f"request_id={stream.headers['x-request-id']}"]),
        (["method=HEAD", "path=//health", "status=200"], []),
        (["method=GET", "path=/v1/models", "status=401"], []),
        (["method=GET", "path=/metrics", "status=500"], []),
    ]
    assert all(float(words[4].removeprefix("ms=")) >= 0 for words in access)


async def test_there_is_no_access_log_unless_asked_for(
    client: httpx.AsyncClient, log_of: pytest.LogCaptureFixture
) -> None:
    """Guards against a line a request in every log."""
    assert (await client.get("/v1/models")).status_code == 200
    assert [line for line in log_of.messages if line.startswith(("access", "request_refused"))] == []
