"""One HTTP request for tokens, from its first byte to its last: read, prepare, generate, answer.

Whatever happens (an error, the client gone, time up, the server cancelled), every generation of the request is closed
before this returns, and the client is told once. Knows OpenAI's shapes only through `schema` and `answers`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from baton.node.errors import BadRequest, Overloaded, PeerLost
from baton.node.messages.control import SamplingParams
from baton.node.telemetry import log_event
from baton.proxy.http.answers import (
    Answers,
    ChatAnswers,
    ChoiceText,
    CompletionAnswers,
    TokenLogprob,
    TokenUsage,
)
from baton.proxy.http.asgi import ClientGone, Reply, gone, read_body
from baton.proxy.http.failures import failure_of, kind_of
from baton.proxy.http.generate import Assembler, Piece, StopRule, merge, pieces
from baton.proxy.http.prepare import Generation, generations
from baton.proxy.http.schema import ParsedRequest
from baton.proxy.interface import AppSettings, Engine
from baton.proxy.metrics.meter import CANCELLED, GenerationMeter
from baton.proxy.metrics.metrics import ProxyMetrics
from baton.proxy.metrics.record import GenerationInfo, RequestRecord
from baton.proxy.metrics.request_log import RequestLog
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.text.model_text import ModelText

logger = logging.getLogger(__name__)

DEADLINE_GRACE_S = 5.0
"""The engine ends a request at its deadline; so much later this does, whatever the engine and the client do."""
TRACE_HEADERS = ("traceparent", "tracestate")
"""Of the W3C Trace Context recommendation: which trace the client's request belongs to."""


@dataclass(slots=True)
class RequestLimit:
    """How many requests are being answered; bounds what they hold in memory."""

    limit: int
    inside: int = 0

    def __enter__(self) -> None:
        if self.inside >= self.limit:
            raise Overloaded(f"{self.limit} requests are being answered already", retry_after_s=1.0)
        self.inside += 1

    def __exit__(self, *_: object) -> None:
        self.inside -= 1


@dataclass(frozen=True, slots=True)
class Service:
    """What all requests of one app share."""

    engine: Engine
    text: ModelText
    settings: AppSettings
    metrics: ProxyMetrics
    journal: RequestLog
    gate: RequestLimit

    def check_model(self, name: str) -> None:
        """Raises BadRequest (404) unless `name` is the model that is served."""
        if name != self.settings.served_model_name:
            message = f"The model `{name[:128]}` does not exist; this server has `{self.settings.served_model_name}`."
            raise BadRequest(message, status=404, param="model", code="model_not_found")

    def max_model_len(self) -> int:
        """Raises PeerLost while no worker has said it."""
        if not self.engine.max_model_len:
            raise PeerLost(self.engine.ready() or "no worker has registered yet")
        return self.engine.max_model_len


@dataclass(slots=True)
class HttpRequest:
    """One HTTP request, from its first byte on."""

    id: str
    operation: str
    arrived_s: float
    """On the clock of the metrics, as the timeline."""
    timeline: Timeline
    began_unix_ns: int
    trace_headers: Mapping[str, str]
    model: str = ""
    stream: bool = False
    begun: bool = False
    """Its generations have, and tell of themselves; until then there is only the request."""

    def about(self, index: int, prompt_tokens: int, sampling: SamplingParams | None) -> GenerationInfo:
        return GenerationInfo(
            request_id=self.id,
            index=index,
            operation=self.operation,
            model=self.model,
            stream=self.stream,
            prompt_tokens=prompt_tokens,
            sampling=sampling,
            began_unix_ns=self.began_unix_ns,
            trace_headers=self.trace_headers,
        )


class GenerateEndpoint:
    """The ASGI endpoint of /v1/completions or /v1/chat/completions, by how it reads a body."""

    def __init__(
        self, service: Service, read: Callable[[bytes], ParsedRequest], *, id_prefix: str, operation: str
    ) -> None:
        self._service = service
        self._read = read
        self._id_prefix = id_prefix
        self._operation = operation

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._request(scope)
        reply = Reply(send, {"x-request-id": request.id})
        try:
            with self._service.gate:
                body = await read_body(scope, receive, self._service.settings.max_body_bytes)
                await _while_there(receive, reply, self._answer(request, body, reply))
        except Exception as error:
            # The server's send raises OSError once the connection is closed; TimeoutError is one too, but our own.
            left = isinstance(error, ClientGone | OSError) and not isinstance(error, TimeoutError)
            if not request.begun:
                self._service.journal.add(_unbegun(request, CANCELLED if left else kind_of(error)))
            if left:
                self._service.metrics.failed["disconnected"].inc()
            else:
                await self._fail(request.id, reply, error)

    def _request(self, scope: Scope) -> HttpRequest:
        clock = self._service.metrics.clock
        now_s, headers = clock(), Headers(scope=scope)
        return HttpRequest(
            id=f"{self._id_prefix}-{secrets.token_hex(16)}",
            operation=self._operation,
            arrived_s=now_s,
            timeline=Timeline(clock, now_s),
            began_unix_ns=time.time_ns(),
            trace_headers={name: headers[name] for name in TRACE_HEADERS if name in headers},
        )

    async def _answer(self, request: HttpRequest, body: bytes, reply: Reply) -> None:
        service = self._service
        async with asyncio.timeout(service.settings.request_timeout_s + DEADLINE_GRACE_S):
            order = self._read(body)
            service.check_model(order.model)
            request.model, request.stream = order.model, order.stream
            request.timeline.enter("tokenise")
            made = await generations(order, service.text, service.settings, service.max_model_len())
            lines = [request.timeline.fork(service.metrics.parts_of(self._operation)) for _ in made]
            shape = ChatAnswers if order.chat else CompletionAnswers
            answers = shape(request.id, int(time.time()), order.model, order.include_usage)
            exchange = Exchange(order, made, answers, reply, lines)
            async with aclosing(merge(self._sources(request, order, made, lines))) as stream:
                request.begun = True
                await (exchange.stream(stream) if order.stream else exchange.whole(stream))

    def _sources(
        self, request: HttpRequest, order: ParsedRequest, made: list[Generation], lines: list[Timeline]
    ) -> list[AsyncGenerator[Piece, None]]:
        service, stop = self._service, StopRule(order.stop, order.include_stop)
        timeout_s = max(0.001, service.settings.request_timeout_s - (service.metrics.clock() - request.arrived_s))

        def source(generation: Generation, line: Timeline) -> AsyncGenerator[Piece, None]:
            about = request.about(generation.index, len(generation.prompt_ids), generation.sampling)
            return pieces(
                service.engine,
                f"{request.id}-{generation.index}",
                generation,
                Assembler(generation, service.text, stop),
                lambda: GenerationMeter(service.metrics, service.journal, about, line),
                line,
                timeout_s=timeout_s,
                priority=order.priority,
                session_key=order.session_key,
            )

        return [source(generation, line) for generation, line in zip(made, lines, strict=True)]

    async def _fail(self, request_id: str, reply: Reply, error: Exception) -> None:
        """Tell the client; what nobody raised on purpose goes into the log with its traceback, never to the client."""
        self._service.metrics.failed[kind_of(error)].inc()
        if kind_of(error) == "internal":
            logger.error("request_failed request_id=%s", request_id, exc_info=error)
        else:
            log_event(
                logger,
                "request_failed",
                level=logging.DEBUG,
                request_id=request_id,
                kind=kind_of(error),
                reason=str(error),
            )
        try:
            await reply.fail(failure_of(error))
        except OSError:  # TimeoutError is one: the client has gone, or stopped reading
            log_event(logger, "client_gone", level=logging.DEBUG, request_id=request_id)


class Exchange:
    """Turns the pieces of one request into its answer, counting what goes into `usage`."""

    def __init__(
        self, order: ParsedRequest, made: list[Generation], answers: Answers, reply: Reply, lines: Sequence[Timeline]
    ) -> None:
        self._order = order
        self._made = made
        self._answers = answers
        self._reply = reply
        self._completion_tokens = 0
        self._cached_tokens = [0] * len(made)
        self._begun: set[int] = set()
        self._unshown = dict(enumerate(lines))
        """Timelines that wait for their first or second answer to be written; soon empty, as each token looks here."""

    async def whole(self, stream: AsyncGenerator[Piece, None]) -> None:
        """Everything in one body."""
        texts: list[list[str]] = [[generation.echo] for generation in self._made]
        logprobs: list[list[TokenLogprob]] = [[] for _ in self._made]
        finishes = [""] * len(self._made)
        async for piece in stream:
            self._count(piece)
            texts[piece.index].append(piece.text)
            logprobs[piece.index].extend(piece.logprobs)
            finishes[piece.index] = piece.finish
            if self._unshown:
                self._show(piece.index)
        choices = [
            ChoiceText(index, "".join(texts[index]), self._shown(logprobs[index]), finishes[index])
            for index in range(len(self._made))
        ]
        await self._reply.whole(self._answers.whole(choices, self._usage()))

    async def stream(self, stream: AsyncGenerator[Piece, None]) -> None:
        """An event for each piece that shows something; the answer begins with the first token, not before."""
        async for piece in stream:
            self._count(piece)
            events = self._events(piece)
            if events:
                await self._reply.events(*events)
                if self._unshown:
                    self._show(piece.index)
        last = [self._answers.usage(self._usage())] if self._order.include_usage else []
        await self._reply.events(*last, b"[DONE]")
        await self._reply.end()

    def _events(self, piece: Piece) -> list[bytes]:
        events, text = [], piece.text
        if piece.index not in self._begun:
            self._begun.add(piece.index)
            opening = self._answers.opening(piece.index)
            events = [opening] if opening else []
            text = self._made[piece.index].echo + text
        if text or piece.logprobs or piece.finish:
            choice = ChoiceText(piece.index, text, self._shown(piece.logprobs), piece.finish)
            events.append(self._answers.chunk(choice))
        return events

    def _show(self, index: int) -> None:
        """This generation's tokens were given to the client, or kept for an answer in one piece."""
        line = self._unshown.get(index)
        if line is not None and not line.shown():
            del self._unshown[index]

    def _shown(self, logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> tuple[TokenLogprob, ...] | None:
        return tuple(logprobs) if self._order.wish.logprobs else None

    def _count(self, piece: Piece) -> None:
        self._completion_tokens += piece.num_tokens
        self._cached_tokens[piece.index] = piece.cached_tokens

    def _usage(self) -> TokenUsage:
        """A prompt counts once, however many answers it has."""
        firsts = range(0, len(self._made), self._order.n)
        prompt_tokens = sum(len(self._made[index].prompt_ids) for index in firsts)
        cached_tokens = sum(self._cached_tokens[index] for index in firsts)
        return TokenUsage(prompt_tokens, self._completion_tokens, cached_tokens)


def _unbegun(request: HttpRequest, outcome: str) -> RequestRecord:
    """The record of a request that ended before there was anything to generate."""
    request.timeline.end(finished=False)
    return RequestRecord(
        about=request.about(0, 0, None),
        outcome=outcome,
        generated_tokens=0,
        cached_tokens=0,
        parts=request.timeline.parts,
        attempts=(),
        num_attempts=0,
        loaded_tokens=(),
        prefix_hash=b"",
    )


async def _while_there(receive: Receive, reply: Reply, work: Coroutine[None, None, None]) -> None:
    """Run `work` to its end, or cancel it and raise ClientGone when the client leaves before it has the answer."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and not reply.ended:
            raise ClientGone
        await working
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
