"""The actors of one deployment and the placement groups that hold their resources: started, added, drained, removed.

It talks to Ray and to no node of Baton. All are detached, so that they outlive the driver.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from baton.launch.ray.actor import NodeActor
from baton.launch.ray.host import HostReport
from baton.launch.ray.plan import NodePlan, proxy_plan, worker_plan
from baton.launch.ray.settings import RaySettings
from baton.node.errors import SettingsError
from baton.node.secret_file import SECRET_BYTES

REPORT_S = 5.0
ROOM_S = 15.0
"""How long an added worker waits for room."""


@dataclass(slots=True)
class _Placed:
    """One node's actor, and the placement group that it is in."""

    plan: NodePlan
    actor: Any
    group: PlacementGroup | None
    """None: on the driver's machine, by affinity."""


class Deployment:
    """One proxy on the driver's machine and the workers of both roles wherever Ray has room."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._id = f"{settings.name}-{secrets.token_hex(4)}"
        self._secret = "" if settings.secret_file is not None else secrets.token_hex(SECRET_BYTES)
        self._proxy_host = ray.util.get_node_ip_address()
        self._on_gpu = settings.device == "cuda" or (settings.device == "auto" and _num_gpus() > 0)
        self._placed: dict[str, _Placed] = {}

    def start(self) -> None:
        """Make all actors. Raises SettingsError where the cluster has no room, or such a deployment already."""
        self._place_proxy()
        for role, count in (("prefill", self._settings.prefill), ("decode", self._settings.decode)):
            if count:
                workers = [self._worker(role, index) for index in range(count)]
                self._place(workers, self._settings.start_timeout_s)

    def count(self, role: str) -> int:
        return sum(placed.plan.role == role for placed in self._placed.values())

    def resize(self, role: str, count: int) -> None:
        """Have so many workers of a role. New ones get groups of their own; the last ones are drained first, so that
        what was added is given back at once, and the group of the start when all of it is gone. Raises SettingsError
        where the cluster has no room."""
        names = [name for name, placed in self._placed.items() if placed.plan.role == role]
        for index in range(len(names), count):
            self._place([self._worker(role, index)], ROOM_S)
        self._end(names[count:])

    def reports(self) -> dict[str, HostReport | str]:
        """What each actor says, or why it says nothing: it is being started anew, or Ray's head is gone."""
        asked = {name: placed.actor.report.remote() for name, placed in self._placed.items()}
        ray.wait(list(asked.values()), num_returns=len(asked), timeout=REPORT_S)
        return {name: _result_of(report) for name, report in asked.items()}

    def stop(self) -> None:
        """Drain workers and proxy, and give everything back."""
        self._end([name for name, placed in self._placed.items() if placed.plan.role != "proxy"])
        self._end(list(self._placed))

    # -- inside

    def _worker(self, role: str, index: int) -> NodePlan:
        return worker_plan(self._settings, role, index, self._proxy_host, self._on_gpu)

    def _place_proxy(self) -> None:
        plan = proxy_plan(self._settings, self._proxy_host)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._placed[plan.name] = _Placed(plan, self._make(plan, here), None)

    def _place(self, plans: Sequence[NodePlan], wait_s: float) -> None:
        """In one group, which is there when all of them fit as --spread says."""
        bundles = [plan.resources for plan in plans]
        name = f"{self._settings.name}/{plans[0].name}"
        group = placement_group(bundles, strategy=self._settings.spread, name=name, lifetime="detached")
        if not group.wait(wait_s):
            remove_placement_group(group)
            raise SettingsError(f"the Ray cluster has no room for {plans[0].role} workers: {bundles}")
        for index, plan in enumerate(plans):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
            self._placed[plan.name] = _Placed(plan, self._make(plan, strategy), group)

    def _make(self, plan: NodePlan, strategy: Any) -> Any:
        options = {
            "name": f"{self._settings.name}/{plan.name}",
            "lifetime": "detached",
            "num_cpus": plan.num_cpus,
            "num_gpus": plan.num_gpus,
            "max_restarts": -1,
            "max_task_retries": 0,
            "max_concurrency": 2,
            "scheduling_strategy": strategy,
        }
        secret_file = str(self._settings.secret_file or "")
        make = ray.remote(NodeActor).options(**options).remote
        try:
            return make(plan, self._id, self._secret, secret_file, self._settings.grace_s)
        except ValueError as error:  # the name is taken
            raise SettingsError(f"--name {self._settings.name}: {error}") from None

    def _end(self, names: Sequence[str]) -> None:
        stopping = {name: self._placed[name].actor.stop.remote() for name in names}
        if stopping:
            ray.wait(list(stopping.values()), num_returns=len(stopping), timeout=self._settings.grace_s + 15.0)
        ended = [self._placed.pop(name) for name in names]
        for placed in ended:
            ray.kill(placed.actor)
        kept = {id(placed.group) for placed in self._placed.values()}
        for group in {id(each.group): each.group for each in ended if each.group is not None}.values():
            if id(group) not in kept:
                remove_placement_group(group)


def take_down(name: str, grace_s: float) -> int:
    """End what a command that has died left of this deployment; returns the number of its actors."""
    found = [each for each in ray.util.list_named_actors() if each.startswith(f"{name}/")]
    actors = [ray.get_actor(each) for each in sorted(found, key=lambda each: each.endswith("/proxy"))]  # the proxy last
    for some in (actors[:-1], actors[-1:]):
        stopping = [actor.stop.remote() for actor in some]
        if stopping:
            ray.wait(stopping, num_returns=len(stopping), timeout=grace_s + 15.0)
    for actor in actors:
        ray.kill(actor)
    for group in ray.util.placement_group_table().values():
        if group["name"].startswith(f"{name}/") and group["state"] != "REMOVED":
            remove_placement_group(ray.util.get_placement_group(group["name"]))
    return len(actors)


def _num_gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0.0))


def _result_of(report: Any) -> HostReport | str:
    try:
        return ray.get(report, timeout=0)
    except ray.exceptions.GetTimeoutError:
        return "no answer"
    except ray.exceptions.RayError as error:
        return type(error).__name__
