"""The proxy's routes: OpenAI's and Anthropic's APIs, probes, metrics.

Puts the pieces together and owns nothing itself; the endpoints that generate are in `endpoint`.
"""

from __future__ import annotations

import asyncio
import gzip
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from urllib.parse import quote

import msgspec
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from baton.node.errors import BadRequest, BatonError, PeerLost
from baton.node.messages.control import SamplingSpec
from baton.proxy.group import OWN_METRICS, READ_ADAPTERS, REPORTED_METRICS, Alone
from baton.proxy.http.absent import EMBEDDINGS, embeddings_note
from baton.proxy.http.adapter_routes import add_adapter_routes
from baton.proxy.http.anthropic.request import read_messages
from baton.proxy.http.encoders import ChatEncoder, CompletionEncoder
from baton.proxy.http.endpoint import Api, GenerateEndpoint
from baton.proxy.http.front import CORS_METHODS, AccessLog, LenientPaths, accepts_gzip
from baton.proxy.http.guard import PROBES, Guard, tenant_of
from baton.proxy.http.hosts import HostCheck
from baton.proxy.http.refusals import add_failure_handlers
from baton.proxy.http.responses.request import read_responses
from baton.proxy.http.schema import read_chat, read_completion
from baton.proxy.http.service import ModelEntry, Service, make_service
from baton.proxy.http.token_counts import add_token_counts
from baton.proxy.http.tokenizer_routes import add_tokenizer_routes
from baton.proxy.interface import AppSettings, Engine, Generation
from baton.proxy.metrics.dashboard import add_dashboard
from baton.proxy.metrics.pieces import join_in_pieces
from baton.proxy.metrics.record import as_json
from baton.proxy.metrics.request_log import Spans
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.text.model_text import ModelText

APIS = (
    Api("/v1/completions", lambda body: (read_completion(body), CompletionEncoder), "cmpl-", "text_completion"),
    Api("/v1/chat/completions", lambda body: (read_chat(body), ChatEncoder), "chatcmpl-", "chat"),
    Api("/v1/responses", read_responses, "resp_", "chat"),
    Api("/v1/messages", read_messages, "msg_", "chat"),
)
PAST_REQUESTS = "/debug/requests/"
GZIP_LEVEL = 1
"""Makes a tenth of an exposition, in a millisecond; higher levels save little more."""
PROBE_TEXT = (
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
)
"""Long enough not to be prefilled by a decode worker, where that is for short prompts only."""


def create_app(
    engine: Engine, texts: Mapping[str, ModelText], settings: AppSettings, spans: Spans | None = None
) -> FastAPI:
    """The app of a proxy that is alone at its port; see `app_of`."""
    return app_of(make_service(engine, texts, settings, spans))


def app_of(service: Service) -> FastAPI:
    """The app to be served. It closes the text sides and the log when it shuts down, and leaves the engine to its
    owner."""
    settings, metrics = service.settings, service.metrics

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        texts = {model.text for model in service.models.values()}
        for text in texts:
            text.start()
        yield
        for text in texts:
            text.close()
        await asyncio.to_thread(service.log.close)

    # No OpenAPI pages: they describe FastAPI's view of the bodies, and would be routes to guard.
    app = FastAPI(title="Baton", openapi_url=None, docs_url=None, redoc_url=None, lifespan=lifespan)
    open_paths = PROBES | add_dashboard(app) if settings.metrics else PROBES
    _add_front(app, service, open_paths)
    pooling = {model.name: model.text.pooling for model in service.models.values()}
    add_failure_handlers(app, metrics, service.refusals, {EMBEDDINGS: embeddings_note(pooling)})
    _add_probes(app, service)
    _add_models(app, service)
    add_tokenizer_routes(app, service)
    add_token_counts(app, service)
    add_adapter_routes(app, service)
    if settings.debug_requests:
        _add_debug(app, service)
    for api in APIS:
        app.router.routes.append(Route(api.path, GenerateEndpoint(service, api), methods=["POST"]))
    return app


def _add_front(app: FastAPI, service: Service, open_paths: frozenset[str]) -> None:
    """What a request passes before its route, the last one first."""
    settings = service.settings
    app.add_middleware(
        Guard, tenants=service.tenants, routes=app.routes, open_paths=open_paths, on_refused=service.refusals.add
    )
    app.add_middleware(LenientPaths)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=CORS_METHODS,
            allow_headers=["*"],
            expose_headers=["*"],
        )
    if settings.allowed_hosts is not None:
        app.add_middleware(HostCheck, allowed=settings.allowed_hosts, on_refused=service.refusals.add)
    if settings.access_log:
        app.add_middleware(AccessLog)


def group_app_of(service: Service) -> FastAPI:
    """The app for the other proxies at the port, and for the process that started this one: what this proxy alone
    knows. It needs no key: its socket is in a folder of this user's. Errors here are not a client's, nor counted."""
    app = FastAPI(title="Baton", openapi_url=None, docs_url=None, redoc_url=None)
    _add_probes(app, replace(service, group=Alone()))

    @app.get(OWN_METRICS)
    async def own() -> Response:
        return Response(await join_in_pieces(service.metrics.own()), media_type=CONTENT_TYPE_LATEST)

    @app.get(REPORTED_METRICS)
    async def reported() -> Response:
        return Response(await join_in_pieces(service.metrics.reported()), media_type=CONTENT_TYPE_LATEST)

    @app.get(PAST_REQUESTS + "{request_id:path}")
    async def one_request(request_id: str) -> Response:
        return _past_request(service, request_id) or Response(status_code=404)

    @app.get(READ_ADAPTERS)
    async def read_adapters() -> Response:
        """Another proxy has changed names of adapters."""
        if service.adapter_changes is not None:
            await service.adapter_changes.follow()
        return Response()

    return app


def _add_probes(app: FastAPI, service: Service) -> None:
    one_probe = asyncio.Lock()

    @app.get("/live")
    async def live() -> Response:
        return _json({"status": "ok"})

    @app.get("/health")
    @app.get("/ready")
    async def ready() -> Response:
        reason = service.engine.ready()
        return _json({"status": "unavailable", "reason": reason}, 503) if reason else _json({"status": "ok"})

    @app.get("/health_generate")
    async def health_generate() -> Response:
        """Real tokens through real workers, within a bound; one probe at a time, as it costs as much as a request."""
        try:
            async with asyncio.timeout(service.settings.probe_timeout_s), one_probe:
                token_id = await _two_tokens(service)
        except (BatonError, TimeoutError) as error:
            return _json({"status": "unavailable", "reason": str(error) or "no token in time"}, 503)
        return _json({"status": "ok", "token": token_id})

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": service.settings.version})

    if service.settings.metrics:

        @app.get("/metrics")
        async def metrics(request: Request) -> Response:
            text, headers = await service.group.metrics(service.metrics), {"vary": "accept-encoding"}
            if accepts_gzip(request.headers.get("accept-encoding", "")):
                text = await asyncio.to_thread(gzip.compress, text, GZIP_LEVEL)
                headers["content-encoding"] = "gzip"
            return Response(text, headers=headers, media_type=CONTENT_TYPE_LATEST)


def _add_debug(app: FastAPI, service: Service) -> None:
    @app.get(PAST_REQUESTS + "{request_id:path}")
    async def one_request(request_id: str) -> Response:
        """A request that is over, by the id that its answer had: outcome, attempts and timeline of each generation."""
        if (found := _past_request(service, request_id)) is not None:
            return found
        if body := await service.group.find(PAST_REQUESTS + quote(request_id, safe="")):
            return Response(body, media_type="application/json")
        raise BadRequest("no such request has ended lately", status=404, code="request_not_found")


def _past_request(service: Service, request_id: str) -> Response | None:
    """What this proxy knows of a request that is over."""
    # An answer's id is the client's behind a prefix, where the client gave one.
    names = dict.fromkeys((request_id, *(request_id.removeprefix(api.id_prefix) for api in APIS)))
    records = next((found for name in names if (found := service.log.find(name))), None)
    if records is None:
        return None
    return _json({"id": request_id, "generations": [as_json(record) for record in records]})


async def _two_tokens(service: Service) -> int:
    """The first of two tokens: one of prefill's, one of decode's, and KV that moved in between."""
    model = service.default_model
    probe = Generation(
        request_id=f"health-{secrets.token_hex(16)}",
        model=model.name,
        prompt_ids=model.text.encode(PROBE_TEXT, add_special_tokens=True) or (0,),
        sampling=SamplingSpec(max_tokens=2, temperature=0.0),
    )
    timeline = Timeline(service.metrics.clock)
    deltas = service.engine.generate(probe, timeline, timeout_s=service.settings.probe_timeout_s)
    async with aclosing(deltas):
        token_ids = [token_id async for together in deltas for delta in together for token_id in delta.ids]
    if not token_ids:
        raise PeerLost("the engine gave no token")
    return token_ids[0]


def _add_models(app: FastAPI, service: Service) -> None:
    created = int(time.time())

    def shown(name: str, model: ModelEntry) -> dict[str, object]:
        named = {"id": name, "object": "model", "created": created, "owned_by": "baton"}
        if (adapter := model.named) is not None:
            named |= {"created": adapter.created, "root": adapter.root, "parent": adapter.parent}
        return {**named, "max_model_len": service.engine.max_model_len(model.name)}

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        listed = service.models_for(tenant_of(request.scope))
        return _json({"object": "list", "data": [shown(*item) for item in listed.items()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(request: Request, name: str) -> Response:
        return _json(shown(name, service.model(name, tenant_of(request.scope))))


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
