"""As much of Kubernetes' API as helm asks for to render a chart in a cluster: discovery, and objects to look up."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

KINDS = {
    "/api/v1": ("Secret", "Service", "ServiceAccount", "Pod"),
    "/apis/apps/v1": ("Deployment", "StatefulSet"),
    "/apis/policy/v1": ("PodDisruptionBudget",),
    "/apis/networking.k8s.io/v1": ("NetworkPolicy",),
}


@contextmanager
def cluster_with(objects: list[dict[str, Any]], folder: Path) -> Iterator[Path]:
    """The kubeconfig of a cluster that holds these objects, whose names and kinds are the paths they are found at."""
    answers = _discovery() | {_path_of(each): each for each in objects}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = answers.get(self.path.partition("?")[0])
            body = json.dumps(
                found or {"kind": "Status", "apiVersion": "v1", "reason": "NotFound", "code": 404}
            ).encode()
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield _kubeconfig(f"http://127.0.0.1:{server.server_port}", folder)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _path_of(each: dict[str, Any]) -> str:
    metadata = each["metadata"]
    return f"/api/v1/namespaces/{metadata['namespace']}/{each['kind'].lower()}s/{metadata['name']}"


def _discovery() -> dict[str, Any]:
    groups = [path.split("/")[2] for path in KINDS if path.startswith("/apis/")]
    versions = {each: {"groupVersion": f"{each}/v1", "version": "v1"} for each in groups}
    return {
        "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {
            "kind": "APIGroupList",
            "apiVersion": "v1",
            "groups": [
                {"name": each, "versions": [version], "preferredVersion": version} for each, version in versions.items()
            ],
        },
        **{path: _resources(path, kinds) for path, kinds in KINDS.items()},
    }


def _resources(path: str, kinds: tuple[str, ...]) -> dict[str, Any]:
    group_version = path.removeprefix("/apis/").removeprefix("/api/")
    resources = [
        {"name": f"{kind.lower()}s", "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": ["get"]}
        for kind in kinds
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources}


def _kubeconfig(url: str, folder: Path) -> Path:
    file = folder / "kubeconfig"
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": url}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "c",
    }
    file.write_text(yaml.safe_dump(config))
    return file
