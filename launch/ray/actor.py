"""The actor of one node of Baton. All that it does is done by a NodeHost; here is what only Ray knows."""

from __future__ import annotations

import asyncio
import os

import ray

from baton.launch.ray.host import HostReport, NodeHost
from baton.launch.ray.plan import NodePlan

GIVEN_UP = 3
"""Exit status of an actor whose child ends again and again: Ray starts another one, perhaps on another machine."""


class NodeActor:
    """Runs a node from its start to `stop`. Ray calls the constructor again wherever it starts the actor anew."""

    def __init__(self, plan: NodePlan, deployment: str, secret: str, secret_file: str, grace_s: float) -> None:
        asyncio.set_event_loop_policy(asyncio.DefaultEventLoopPolicy())  # Ray's gives children no process groups
        host = ray.util.get_node_ip_address()
        self._host = NodeHost(
            plan, deployment, host, secret, secret_file, grace_s, on_given_up=lambda: os._exit(GIVEN_UP)
        )
        self._host.start()

    def report(self) -> HostReport:
        return self._host.report()

    def stop(self) -> None:
        """Drain the node; returns when it has ended."""
        self._host.stop()
