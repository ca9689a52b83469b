"""The routes of a model's tokenizer, in vLLM's forms: `/tokenize`, `/detokenize`, `/tokenizer_info`, a chat's prompt.

Nothing is generated here, and no worker is asked but for the length of the context.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.proxy.http.bodies import HeldBody
from baton.proxy.http.guard import tenant_of
from baton.proxy.http.messages import ChatMessage, conversation
from baton.proxy.http.schema import MAX_MESSAGES, TokenIds, parse, read_chat
from baton.proxy.http.service import ModelEntry, Service
from baton.proxy.http.template_options import TemplateRequest, render_options
from baton.proxy.text.model_text import ModelText

MAX_DETOKENIZED = 1 << 18
"""The tokenizer takes 0.2 us for each, in which nothing else runs."""
Body = TypeVar("Body", bound=BaseModel)


class TokenizeBody(TemplateRequest):
    """A text, or a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    model: str | None = None
    tokens: Annotated[TokenIds, Field(max_length=MAX_DETOKENIZED)]


def add_tokenizer_routes(app: FastAPI, service: Service) -> None:
    """Each wait for threads and template ends at the deadline of a request."""
    timeout_s = service.settings.request_timeout_s

    def body_of(request: Request) -> AbstractAsyncContextManager[HeldBody]:
        return service.body(request.scope, request.receive, tenant_of(request.scope))

    def model_of(name: str | None, request: Request) -> ModelEntry:
        return service.model_or_default(name, tenant_of(request.scope))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        async with body_of(request) as held:
            body = parse(TokenizeBody, held.content)
            model = model_of(body.model, request)
            limit = service.max_model_len(model.name)
            async with asyncio.timeout(timeout_s):
                ids = await _ids(body, model.text, limit)
        answer: dict[str, object] = {"count": len(ids), "max_model_len": limit, "tokens": ids}
        if body.return_token_strs:
            answer["token_strs"] = await asyncio.to_thread(_pieces, model.text, ids)
        return _json(answer)

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        async with body_of(request) as held:
            body = parse(DetokenizeBody, held.content)
        text = model_of(body.model, request).text
        if body.tokens and max(body.tokens) >= text.num_decodable:
            raise BadRequest(f"token ids must be below {text.num_decodable}", param="tokens")
        return _json({"prompt": text.decode(body.tokens, skip_special_tokens=False)})

    @app.get("/tokenizer_info")
    async def tokenizer_info(request: Request, model: str | None = None) -> Response:
        return _json(model_of(model, request).text.info())

    @app.post("/v1/chat/completions/render")
    async def render(request: Request) -> Response:
        """The prompt that a chat request would have, for those who write or debug a template."""
        async with body_of(request) as held:
            parsed = read_chat(held.content)
            model = service.model(parsed.model, tenant_of(request.scope))
            limit = service.max_model_len(model.name)
            async with asyncio.timeout(timeout_s):
                prompt = await model.text.render_bounded(parsed.messages, parsed.render)
                ids = await _encode(model.text, prompt, False, limit, "messages")
        return _json({"prompt": prompt, "token_ids": ids})


async def _ids(body: TokenizeBody, text: ModelText, limit: int) -> tuple[int, ...]:
    if (body.prompt is None) == (body.messages is None):
        raise BadRequest("one of prompt and messages must be given", param="prompt")
    if body.messages is None:
        return await _encode(text, body.prompt or "", body.add_special_tokens is not False, limit, "prompt")
    prompt = await text.render_bounded(conversation(body.messages), render_options(body, body.tools or ()))
    return await _encode(text, prompt, body.add_special_tokens is True, limit, "messages")


async def _encode(text: ModelText, prompt: str, special: bool, limit: int, param: str) -> tuple[int, ...]:
    return await text.encode_bounded(prompt, add_special_tokens=special, max_tokens=limit, param=param)


def _pieces(text: ModelText, ids: Sequence[int]) -> list[str]:
    """The text of each token; U+FFFD for a part of a character."""
    return [text.token_bytes(token_id, first=place == 0).decode(errors="replace") for place, token_id in enumerate(ids)]


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
