"""What `baton ray` runs: the nodes of Baton, what each needs of Ray, and its command line on the machine where it is.

It knows neither Ray nor the machines: addresses are given when a command line is made.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from baton.launch.local import served_name_of
from baton.launch.ray.settings import RaySettings
from baton.node.api_settings import KEY_VARIABLE, ApiSettings
from baton.node.engine_settings import engine_arguments
from baton.node.settings import as_arguments


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node. `arguments` are complete but for its own address and the secret."""

    name: str
    role: str
    """proxy, prefill or decode."""
    arguments: tuple[str, ...]
    num_cpus: float
    num_gpus: float
    env: Mapping[str, str] = field(default_factory=dict)
    """What it has in its environment besides."""

    @property
    def resources(self) -> dict[str, float]:
        """A bundle of a placement group."""
        needed = {"CPU": self.num_cpus, "GPU": self.num_gpus}
        return {name: amount for name, amount in needed.items() if amount} or {"CPU": 0.001}  # none may be empty

    def command(self, host: str, secret_file: str) -> tuple[str, ...]:
        """Its command line on the machine with this address."""
        own = () if self.role == "proxy" else ("--bind", f"tcp://{_in_url(host)}:0")
        return (sys.executable, "-P", "-m", f"baton.{self.role}", "--secret-file", secret_file, *own, *self.arguments)


def proxy_plan(settings: RaySettings, proxy_host: str) -> NodePlan:
    """The proxy, on the machine with this address."""
    api = {each.name: getattr(settings, each.name) for each in fields(ApiSettings) if each.name != "api_key"}
    api["served_model_name"] = settings.served_model_name or (served_name_of((), settings.model),)
    local_prefill = () if settings.prefill else ("--local-prefill", "always")
    arguments = (
        *("--model", settings.model, "--control-address", f"tcp://{_in_url(proxy_host)}:{settings.control_port}"),
        *as_arguments(ApiSettings, api),
        *("--orphan-s", str(settings.orphan_s)),
        *local_prefill,
        *settings.proxy_arg,
    )
    env = {KEY_VARIABLE: "\n".join(settings.api_key)} if settings.api_key else {}
    return NodePlan("proxy", "proxy", arguments, settings.proxy_cpus, 0.0, env)


def worker_plan(settings: RaySettings, role: str, index: int, proxy_host: str, on_gpu: bool) -> NodePlan:
    """Worker number `index` of its role. Ray gives it its GPU, which is the only one that it sees."""
    name = f"{role}-{index}"
    arguments = (
        *("--model", settings.model, "--proxy", f"tcp://{_in_url(proxy_host)}:{settings.control_port}"),
        *("--worker-id", name, "--device", "cuda" if on_gpu else "cpu", "--orphan-s", str(settings.orphan_s)),
        *engine_arguments(settings),
        *settings.worker_arg,
        *(settings.prefill_arg if role == "prefill" else settings.decode_arg),
    )
    return NodePlan(name, role, arguments, settings.worker_cpus, 1.0 if on_gpu else 0.0)


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
