"""How many tokens the prompt of a request has, without generating anything, for the APIs that have a route for it.

A request is read, rendered and tokenised as one that generates, within the same bounds.
Sources: the Anthropic API reference (count tokens), the OpenAI API reference (Responses, input tokens).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec
from fastapi import FastAPI, Request, Response

from baton.proxy.http.anthropic.request import read_count
from baton.proxy.http.guard import tenant_of
from baton.proxy.http.prepare import prompts_of
from baton.proxy.http.responses.request import read_responses
from baton.proxy.http.schema import ParsedRequest
from baton.proxy.http.service import Service


def add_token_counts(app: FastAPI, service: Service) -> None:
    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        return await _count(request, service, read_count, {})

    @app.post("/v1/responses/input_tokens")
    async def input_tokens(request: Request) -> Response:
        return await _count(request, service, lambda body: read_responses(body)[0], {"object": "response.input_tokens"})


async def _count(
    request: Request, service: Service, read: Callable[[bytes], ParsedRequest], fields: Mapping[str, object]
) -> Response:
    """It waits for threads and template until the deadline of a request. `fields` are those of the answer beside it."""
    tenant = tenant_of(request.scope)
    async with service.body(request.scope, request.receive, tenant) as held:
        parsed = read(held.content)
        model = service.model(parsed.model, tenant)
        headers = service.unknown.accept(parsed.unknown)
        async with asyncio.timeout(service.settings.request_timeout_s):
            ((ids, _),) = await prompts_of(parsed, model.text, service.max_model_len(model.name))
    body = msgspec.json.encode({**fields, "input_tokens": len(ids)})
    return Response(body, headers=headers, media_type="application/json")
