"""One HTTP request for tokens, from its first byte to its last: read, prepare, generate, answer.

Whatever happens (an error, the client gone, time up, the server cancelled), every generation of the request is closed
before this returns, and the client gets one end. Knows the shapes of an API only through `Api`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial

from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from baton.node.errors import InvariantBroken, Overloaded
from baton.node.messages.control import SamplingSpec
from baton.node.telemetry import format_value, log_event
from baton.proxy.formats.events import call_id
from baton.proxy.formats.machine import FormatMachine
from baton.proxy.http.asgi import READ_TIMEOUT_S, ClientGone, ClientStalled, ReadWatch, Reply, gone
from baton.proxy.http.assembler import Assembler
from baton.proxy.http.bodies import HeldBody
from baton.proxy.http.encoder import AnswerHeader, Encoder, EncoderMaker, WithoutReasoning
from baton.proxy.http.events import Event
from baton.proxy.http.failures import failure_of, kind_of
from baton.proxy.http.guard import tenant_of
from baton.proxy.http.pace import arrived_s
from baton.proxy.http.prepare import Choice, choices_of, reserved_tokens
from baton.proxy.http.prompt_scores import ScoreRule
from baton.proxy.http.responder import Responder
from baton.proxy.http.schema import ParsedRequest
from baton.proxy.http.service import ModelEntry, Service
from baton.proxy.interface import Delta
from baton.proxy.metrics.meter import CANCELLED, GenerationMeter
from baton.proxy.metrics.record import GenerationInfo, GenerationRecord
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.tenants.tenants import Tenant
from baton.proxy.tenants.usage import Reservation

logger = logging.getLogger(__name__)

DEADLINE_GRACE_S = 5.0
"""The engine ends a request at its deadline; this long after it, the endpoint does, whatever engine and client do."""
ID_HEADER = "x-request-id"
MAX_ID_CHARS = 96
TRACE_HEADERS = ("traceparent", "tracestate")
"""Of the W3C Trace Context recommendation: which trace the client's request belongs to."""


@dataclass(frozen=True, slots=True)
class Api:
    """One API: how its bodies are read and its answers written."""

    path: str
    read: Callable[[bytes], tuple[ParsedRequest, EncoderMaker]]
    """The request in a body, and what writes its answer, which may repeat fields of that request."""
    id_prefix: str
    """Of the ids of answers, with what divides it from the rest: `cmpl-`, `msg_`."""
    operation: str
    """As OpenTelemetry names it."""


@dataclass(slots=True)
class HttpRequest:
    """One HTTP request, from its first byte on."""

    id: str
    """In the answer's header, in logs and for looking it up: the client's, else ours."""
    tenant: Tenant
    answer_id: str
    """In the body of the answer."""
    own_id: str
    """Unique, whatever clients send: the generations have their names from it."""
    operation: str
    arrived_s: float
    """On the clock of the metrics, as the timeline."""
    timeline: Timeline
    began_unix_ns: int
    trace_headers: Mapping[str, str]
    model: str = ""
    stream: bool = False
    reservation: Reservation = field(default_factory=Reservation)
    """Of tokens, once its prompts are known."""
    responder: Responder | None = None
    """Once its generations have begun, and each has a record of its own; until then the request has one."""

    def info(self, index: int, prompt_tokens: int, sampling: SamplingSpec | None) -> GenerationInfo:
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
    """The ASGI endpoint of one API."""

    def __init__(self, service: Service, api: Api) -> None:
        self._service = service
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._request(scope)
        reply = Reply(send, {ID_HEADER: request.id})
        try:
            async with self._service.body(scope, receive, request.tenant) as body:
                with self._service.client_ids.claim(request.id, request.tenant.name):
                    request.tenant.usage.count_request()
                    await _while_connected(receive, reply, self._answer(request, body, reply))
        except Exception as error:
            # The server's send raises OSError once the connection is closed; TimeoutError is one too, but our own.
            left = isinstance(error, ClientGone | OSError) and not isinstance(error, TimeoutError)
            if request.responder is None:
                self._service.log.add(_record_without_generation(request, CANCELLED if left else kind_of(error)))
            if isinstance(error, ClientStalled):
                self._service.metrics.failed["slow_reader"].inc()
                log_event(logger, "slow_reader", level=logging.INFO, request_id=request.id, reason=str(error))
            elif left:
                self._service.metrics.failed["disconnected"].inc()
            else:
                await self._fail(request, reply, error)

    def _request(self, scope: Scope) -> HttpRequest:
        clock = self._service.metrics.clock
        now_s, headers = arrived_s(scope, clock), Headers(scope=scope)
        own_id = f"{self._api.id_prefix}{secrets.token_hex(16)}"
        client_id = _usable_id(headers.get(ID_HEADER, ""))
        return HttpRequest(
            id=client_id or own_id,
            tenant=tenant_of(scope),
            answer_id=f"{self._api.id_prefix}{client_id}" if client_id else own_id,
            own_id=own_id,
            operation=self._api.operation,
            arrived_s=now_s,
            timeline=Timeline(clock, now_s),
            began_unix_ns=time.time_ns(),
            trace_headers={name: headers[name] for name in TRACE_HEADERS if name in headers},
        )

    async def _answer(self, request: HttpRequest, body: HeldBody, reply: Reply) -> None:
        service = self._service
        async with asyncio.timeout(service.settings.request_timeout_s + DEADLINE_GRACE_S):
            parsed, make_encoder = self._api.read(body.content)
            model = service.model(parsed.model, request.tenant)
            request.model, request.stream = parsed.model, parsed.stream
            reply.add_headers(service.unknown.accept(parsed.unknown))
            request.timeline.enter("tokenise")
            known = parsed if parsed.model == model.name else replace(parsed, model=model.name)
            max_model_len = service.max_model_len(model.name)
            made = await choices_of(
                known, model.text, service.settings, max_model_len, request.own_id, request.tenant, model.adapter
            )
            del known
            parsed = replace(parsed, prompts=(), messages=())  # the tokens have taken their place
            body.clear()
            with request.tenant.usage.reserve(reserved_tokens(made, parsed.n)) as reservation:
                request.reservation = reservation
                reply.add_headers(request.tenant.usage.headers())
                encoder = make_encoder(_header_of(request, parsed, made[0], service.settings.reasoning_field))
                if not parsed.shows_reasoning:
                    encoder = WithoutReasoning(encoder)
                await self._answer_choices(request, parsed, model, made, reply, encoder)

    async def _answer_choices(
        self,
        request: HttpRequest,
        parsed: ParsedRequest,
        model: ModelEntry,
        made: Sequence[Choice],
        reply: Reply,
        encoder: Encoder,
    ) -> None:
        """All generations of the request, from their beginning to the end of the answer."""
        timelines = [request.timeline.fork(model.metrics.segments_of(request.operation)) for _ in made]
        responder = request.responder = Responder(reply, encoder, timelines, stream=parsed.stream)
        if request.id != request.own_id:  # workers, and log lines of attempts, know its generations by ours
            log_event(logger, "request_begun", level=logging.DEBUG, request_id=request.id, generations=request.own_id)
        at_once = self._service.settings.max_generations
        for timeline in timelines[at_once:]:
            timeline.enter("queue")
        await _all(
            [
                partial(self._generate, request, parsed, model, choice, timeline, responder)
                for choice, timeline in zip(made, timelines, strict=True)
            ],
            at_once,
        )
        await responder.end(parsed.n)

    async def _generate(
        self,
        request: HttpRequest,
        parsed: ParsedRequest,
        model: ModelEntry,
        choice: Choice,
        timeline: Timeline,
        responder: Responder,
    ) -> None:
        """One choice, from the engine's tokens to the responder; a stop string cancels it at the engine."""
        service, generation = self._service, choice.generation
        machine = _machine_of(request, parsed, model, choice)
        assembler = Assembler(
            generation,
            choice.echo,
            model.text,
            parsed.stop,
            parsed.ids,
            skip_special_tokens=parsed.skip_special_tokens,
            scores=ScoreRule(parsed.echo_logprobs, parsed.sampling.prompt_logprobs),
            machine=machine,
            named_call=parsed.tools is not None and parsed.tools.named,
        )
        info = request.info(choice.index, len(generation.prompt_ids), generation.sampling)
        usage = None if model.named is None else model.named.usage
        meter = GenerationMeter(model.metrics, service.log, info, timeline, usage)
        outcome = CANCELLED
        spent_s = service.metrics.clock() - request.arrived_s
        deltas = service.engine.generate(
            generation, timeline, timeout_s=max(0.001, service.settings.request_timeout_s - spent_s)
        )
        try:
            async with aclosing(deltas):
                async for together in deltas:
                    before = assembler.num_tokens
                    grown = _events_of(together, assembler, continuous_usage=parsed.continuous_usage)
                    if assembler.num_tokens > before:
                        meter.tokens(assembler.num_tokens - before, together[-1].cached_tokens)
                    outcome = assembler.finish or CANCELLED
                    if grown:
                        await responder.take(choice.index, grown, together[-1].cached_tokens)
                    if assembler.finish:
                        return
            raise InvariantBroken(f"generation {generation.request_id} ended without a finish")
        except Exception as error:
            outcome = kind_of(error)
            request.tenant.usage.totals.rejected["queue"] += isinstance(error, Overloaded)
            raise
        finally:
            meter.close(outcome)
            if machine is not None and machine.broken_calls:
                _count_broken(generation.request_id, model, machine.broken_calls)
            computed = timeline.num_attempts and outcome in (CANCELLED, "deadline")
            first = choice.index % parsed.n == 0  # of the answers to its prompt
            request.reservation.use(
                len(generation.prompt_ids) if first and (meter.num_tokens or computed) else 0, meter.num_tokens
            )

    async def _fail(self, request: HttpRequest, reply: Reply, error: Exception) -> None:
        """Answer with the error. An unexpected one is logged with its traceback, which never goes to the client."""
        failure = failure_of(error)
        self._service.metrics.failed[kind_of(error)].inc()
        if kind_of(error) == "internal":
            logger.error("request_failed request_id=%s", format_value(request.id), exc_info=error)
        else:
            self._service.refusals.add(failure, self._api.path, request.id)
        reply.add_headers(request.tenant.usage.headers())
        try:
            if not reply.begun:
                await reply.refuse(failure, self._api.path)
            elif request.responder is not None and not reply.ended:
                await request.responder.fail(failure)
        except OSError:  # TimeoutError is one: the client has gone, or stopped reading
            log_event(logger, "client_gone", level=logging.DEBUG, request_id=request.id)


def _header_of(request: HttpRequest, parsed: ParsedRequest, first: Choice, reasoning_field: str) -> AnswerHeader:
    return AnswerHeader(
        id=request.answer_id,
        created=int(time.time()),
        model=parsed.model,
        logprobs=parsed.top_logprobs is not None,
        token_ids=parsed.ids.show,
        include_usage=parsed.include_usage,
        continuous_usage=parsed.continuous_usage,
        prompt_tokens=len(first.generation.prompt_ids),
        sampling=first.generation.sampling,
        reasoning_field=reasoning_field,
    )


def _events_of(deltas: Sequence[Delta], assembler: Assembler, *, continuous_usage: bool) -> list[list[Event]]:
    """Those of each delta, up to the one that ends the answer. None of tokens that have nothing to show yet."""
    grown: list[list[Event]] = []
    for delta in deltas:
        events = assembler.feed(delta)
        if events and continuous_usage and not assembler.finish:
            events.append(assembler.usage(delta.cached_tokens))
        if events or delta.ids:
            grown.append(events)
        if assembler.finish:
            break
    return grown


def _machine_of(request: HttpRequest, parsed: ParsedRequest, model: ModelEntry, choice: Choice) -> FormatMachine | None:
    """What reads the answer of a chat; None where all of it is content."""
    markup, tools = model.text.markup, parsed.tools
    if tools is None or not (tools.schemas or markup.has_reasoning or markup.has_channels):
        return None
    used = markup.with_calls if tools.schemas else markup.without_calls
    if tools.schemas and choice.generation.sampling.grammar is not None:
        used = markup.with_grammar
    id_of = partial(call_id, request.answer_id, choice.index, num_alphanumerics=used.format.id_alphanumerics)
    max_calls = 1 if used.format.one_call else tools.max_calls
    return FormatMachine(used, choice.thinking, tools.schemas, id_of, max_calls=max_calls)


def _count_broken(request_id: str, model: ModelEntry, digests: Sequence[str]) -> None:
    """Calls that clients got unfinished, or as text; the log has a digest of the first one's beginning."""
    name = model.text.markup.with_calls.format.name
    model.metrics.broken_calls[name].inc(len(digests))
    log_event(
        logger,
        "tool_calls_broken",
        level=logging.DEBUG,
        request_id=request_id,
        format=name,
        calls=len(digests),
        first=digests[0],
    )


def _usable_id(sent: str) -> str:
    """What the client calls its request, or "" if that can be no part of a header or a log line."""
    return sent if len(sent) <= MAX_ID_CHARS and sent.isascii() and sent.isprintable() else ""


async def _all(choices: Sequence[Callable[[], Coroutine[None, None, None]]], at_once: int) -> None:
    """Run all choices, `at_once` of them at a time, in order; the first error ends the others and is raised."""
    if len(choices) == 1:  # spare each token a task switch
        await choices[0]()
        return
    places = asyncio.Semaphore(at_once)  # fair: first come, first served

    async def run(choice: Callable[[], Coroutine[None, None, None]]) -> None:
        async with places:
            await choice()

    tasks = [asyncio.ensure_future(run(choice)) for choice in choices]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _record_without_generation(request: HttpRequest, outcome: str) -> GenerationRecord:
    """The record of a request that ended before there was anything to generate."""
    request.timeline.end(finished=False)
    return GenerationRecord(
        info=request.info(0, 0, None),
        outcome=outcome,
        generated_tokens=0,
        cached_tokens=0,
        segments=request.timeline.segments,
        attempts=(),
        num_attempts=0,
        loaded_tokens=(),
        prefix_hash=b"",
    )


async def _while_connected(receive: Receive, reply: Reply, work: Coroutine[None, None, None]) -> None:
    """Run `work` to its end, or cancel it: raise ClientGone when the client leaves before it has the answer, and
    ClientStalled when it stops reading."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone(receive))
    try:
        with ReadWatch(reply) as watch:
            await asyncio.wait({working, watching, watch.stalled}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and watch.stalled.done():
            raise ClientStalled(f"the client has read nothing of its answer for {READ_TIMEOUT_S:g} s")
        if not working.done() and not reply.ended:
            raise ClientGone
        await working
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)
