"""The dashboard: a static page that draws what /metrics says. It has no data of its own, so it needs no key; its
requests for the metrics do.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Response

_TYPES = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
_NAMES = ("index.html", "style.css", "dashboard.js", "panels.js", "charts.js", "exposition.js")
# Nothing comes from another host, nothing is asked of one, and no other page shows this one, which takes a key, in a
# frame. The icon is an empty data: URL.
_POLICY = "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def add_dashboard(app: FastAPI) -> frozenset[str]:
    """Serve the page at /dashboard; returns the paths it takes."""
    return frozenset(_add(app, name) for name in _NAMES)


def _add(app: FastAPI, name: str) -> str:
    path = "/dashboard" if name == "index.html" else f"/dashboard/{name}"
    body = files(__package__).joinpath(name).read_bytes()
    kind = _TYPES[name.rpartition(".")[2]]

    async def page() -> Response:
        return Response(body, media_type=kind, headers=_HEADERS)

    app.add_api_route(path, page, methods=["GET"])
    return path
