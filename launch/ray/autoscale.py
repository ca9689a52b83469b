"""How many workers of a role a deployment shall have: what its proxy asks for, between bounds."""

from __future__ import annotations

import http.client
import re
from collections.abc import Mapping

from baton.launch.ray.settings import RaySettings
from baton.node.tls import own_server_context

TIMEOUT_S = 10.0
_DESIRED = re.compile(r'^baton:desired_replicas\{(?:.*,)?role="(\w+)".*\} (\S+)$', re.MULTILINE)


def bounds_of(settings: RaySettings) -> dict[str, tuple[int, int]]:
    """Least and most workers of the roles that are scaled."""
    bounds = {
        "prefill": (settings.prefill, settings.max_prefill),
        "decode": (settings.decode, settings.max_decode),
    }
    return {role: (least, most) for role, (least, most) in bounds.items() if most > least}


def targets(page: str, bounds: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Workers to have, by role, after a page of the proxy's metrics; no entry for a role that it says nothing of."""
    desired = {role: int(float(value)) for role, value in _DESIRED.findall(page)}
    return {role: min(max(desired[role], least), most) for role, (least, most) in bounds.items() if role in desired}


def metrics_page(host: str, port: int, key: str, tls: bool) -> str:
    """The proxy's metrics; empty where it does not answer in time."""
    if tls:
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            host, port, timeout=TIMEOUT_S, context=own_server_context()
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {key}"} if key else {})
        answer = connection.getresponse()
        return answer.read().decode() if answer.status == http.client.OK else ""
    except (OSError, http.client.HTTPException, UnicodeDecodeError):
        return ""
    finally:
        connection.close()
