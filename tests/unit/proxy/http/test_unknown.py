"""Parameters that mean nothing: what the client and the log get."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

from baton.proxy.http.app import create_app
from baton.proxy.http.unknown import HEADER, MAX_LOGGED, UnknownParameters
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText
from baton.testing.fake_engine import FakeEngine

COMPLETION = {"model": "demo", "prompt": "Hi"}


async def test_unknown_parameters_are_named_once_in_the_log_and_in_each_answer(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    """Guards against parameters lost in silence, a log filled by a client, and a header that a client forges."""
    more = {"top_a": 1, "evil\r\nset-cookie: a": 1, "\u00e9": 1}
    for stream in (False, True):
        answer = await client.post("/v1/completions", json={**COMPLETION, **more, "stream": stream})
        assert answer.status_code == 200
        assert answer.headers["x-baton-ignored-parameters"] == "top_a,evil??set-cookie??a,?"
        assert "set-cookie" not in answer.headers
    lines = [record.getMessage() for record in caplog.records if "unknown_parameter" in record.getMessage()]
    assert lines[0] == "unknown_parameter_ignored name=top_a" and len(lines) == 3
    assert "x-baton-ignored-parameters" not in (await client.post("/v1/completions", json=COMPLETION)).headers


def test_few_unknown_names_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Guards against a log, and a set of names, that grow with what clients invent."""
    unknown = UnknownParameters(refuse=False)
    for n in range(2 * MAX_LOGGED):
        assert unknown.accept([f"name{n}"]) == {HEADER: f"name{n}"}
    assert len(caplog.records) == MAX_LOGGED


async def test_errors_and_headers_quote_little(client: httpx.AsyncClient) -> None:
    """Guards answers against names of megabytes, and terminals against what they quote."""
    many = {f"{n}" + "x" * 5000: 1 for n in range(100)}
    answer = await client.post("/v1/completions", json={**COMPLETION, **many})
    assert len(answer.headers[HEADER]) < 2500
    odd = "\x1b[31m\n" + "x" * 100_000
    for body in ({**COMPLETION, "model": odd}, {**COMPLETION, "logit_bias": {odd: odd}}):
        answer = await client.post("/v1/completions", json=body)
        error = answer.json()["error"]
        assert answer.status_code in (400, 404)
        assert len(answer.content) < 2000 and all((error[key] or "").isprintable() for key in ("message", "param"))


async def test_unknown_parameters_may_be_refused(
    engine: FakeEngine, text: ModelText, app_settings: AppSettings
) -> None:
    """Guards `--unknown-parameters error`."""
    settings = replace(app_settings, refuse_unknown_parameters=True)
    transport = httpx.ASGITransport(create_app(engine, {"demo": text}, settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        answer = await client.post("/v1/completions", json={**COMPLETION, "top_a": 1})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "top_a")
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200
