"""Admits requests by their keys: which tenant a request is of, and whether that tenant may use its path.

What is not said to be for all tenants is for administrators, so that a new route is closed until it is opened here.
ASGI middleware; the tenant is in the request's scope from here on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from baton.node.errors import BadRequest
from baton.proxy.http.asgi import Reply
from baton.proxy.http.failures import Failure, failure_of
from baton.proxy.tenants.tenants import Tenant, Tenants

PROBES = frozenset({"/health", "/live", "/ready"})
FOR_ALL = frozenset(
    {
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/chat/completions/render",
        "/v1/responses",
        "/v1/responses/input_tokens",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/version",
    }
)
"""Routes for every tenant, beside those of its models, below ONE_MODEL."""
ONE_MODEL = "/v1/models/"
FOR_MONITORS = frozenset({"/metrics", "/health_generate"})
"""Routes for tenants that may read metrics: they tell of all tenants."""
_TENANT = "baton.tenant"


class Guard:
    """Lets a request pass that carries a tenant's key, on a path for that tenant. The key is in `Authorization: Bearer
    KEY`, or in `X-Api-Key`, which clients of Anthropic's API send.

    `open_paths` disclose nothing and need no key: an orchestrator's probes, the dashboard's empty page.
    """

    def __init__(
        self,
        app: ASGIApp,
        tenants: Tenants,
        routes: Sequence[BaseRoute],
        open_paths: frozenset[str],
        on_refused: Callable[[Failure, str], None],
    ) -> None:
        """`routes` of the app, some perhaps added later. `on_refused` gets the error and the path of a request that is
        not admitted."""
        self._app = app
        self._tenants = tenants
        self._routes = routes
        self._open_paths = open_paths
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in self._open_paths:
            await self._app(scope, receive, send)
            return
        try:
            scope[_TENANT] = self._admit(scope)
        except BadRequest as error:
            failure = failure_of(error)
            self._on_refused(failure, scope["path"])
            reply = Reply(send, {"www-authenticate": "Bearer"} if error.status == 401 else {})
            await reply.refuse(failure, scope["path"])
            return
        await self._app(scope, receive, send)

    def _admit(self, scope: Scope) -> Tenant:
        tenant = self._tenants.of_key(_key(Headers(scope=scope)).encode("latin-1", "replace"))
        if tenant is None:
            raise BadRequest("Incorrect API key provided.", status=401, code="invalid_api_key")
        if not self._may_use(tenant, scope):
            message = f"This API key may not use {scope['path'][:128]}."
            raise BadRequest(message, status=403, code="insufficient_permissions")
        return tenant

    def _may_use(self, tenant: Tenant, scope: Scope) -> bool:
        path, rules = scope["path"], tenant.rules
        if rules.admin or path in FOR_ALL or path.startswith(ONE_MODEL):
            return True
        if path in FOR_MONITORS and rules.metrics:
            return True
        # A path without a route gets its 404, which says what was meant perhaps.
        return all(route.matches(scope)[0] is Match.NONE for route in self._routes)


def _key(headers: Headers) -> str:
    """Empty where there is none."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return (key if scheme.lower() == "bearer" else headers.get("x-api-key", "")).strip()


def tenant_of(scope: Scope) -> Tenant:
    """The tenant of a request that the guard has admitted."""
    tenant = scope[_TENANT]
    assert isinstance(tenant, Tenant)
    return tenant
