"""`/v1/messages/count_tokens`: how many tokens the prompt of a request has, without generating anything.

The request is read, rendered and tokenised as one to `/v1/messages`, within the same bounds.
Source: the Anthropic API reference (count tokens).
"""

from __future__ import annotations

import asyncio

import msgspec
from fastapi import FastAPI, Request, Response

from baton.proxy.http.anthropic.request import read_count
from baton.proxy.http.guard import tenant_of
from baton.proxy.http.prepare import prompts_of
from baton.proxy.http.service import Service


def add_count_tokens(app: FastAPI, service: Service) -> None:
    """It waits for threads and template until the deadline of a request."""

    @app.post("/v1/messages/count_tokens")
    async def count_tokens(request: Request) -> Response:
        tenant = tenant_of(request.scope)
        async with service.body(request.scope, request.receive, tenant) as held:
            parsed = read_count(held.content)
            model = service.model(parsed.model, tenant)
            headers = service.unknown.accept(parsed.unknown)
            async with asyncio.timeout(service.settings.request_timeout_s):
                ((ids, _),) = await prompts_of(parsed, model.text, service.max_model_len(model.name))
        body = msgspec.json.encode({"input_tokens": len(ids)})
        return Response(body, headers=headers, media_type="application/json")
