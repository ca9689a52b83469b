"""launch.ray.plan: the command lines of a deployment on Ray are those that the nodes understand."""

from __future__ import annotations

from typing import TypeVar

import pytest

from baton.decode.settings import DecodeSettings
from baton.launch.ray.plan import NodePlan, proxy_plan, worker_plan
from baton.launch.ray.settings import RaySettings
from baton.node.api_settings import KEY_VARIABLE
from baton.node.settings import parse
from baton.prefill.settings import PrefillSettings
from baton.proxy.settings import ProxySettings

S = TypeVar("S")
SETTINGS = RaySettings(model="demo", prefill=2, port=8001, api_key=("k",), orphan_s=7.0, decode_arg=("--num-blocks=9",))


def _parsed(cls: type[S], plan: NodePlan) -> S:
    command = plan.command("10.0.0.2", "/run/secret")
    assert command[2:4] == ("-m", f"baton.{plan.role}")
    return parse(cls, command[4:], "x", "x", {})


def test_workers_join_the_proxy_and_are_reached_at_their_machine() -> None:
    """Guards a worker that tells its peers the loopback address, or looks for the proxy on its own machine."""
    for cls, role in ((PrefillSettings, "prefill"), (DecodeSettings, "decode")):
        plan = worker_plan(SETTINGS, role, 1, "10.0.0.1", on_gpu=True)
        worker = _parsed(cls, plan)
        assert (worker.proxy, worker.bind) == (("tcp://10.0.0.1:5570",), "tcp://10.0.0.2:0")
        assert (worker.worker_id, worker.device, worker.orphan_s) == (f"{role}-1", "cuda", 7.0)
        assert worker.num_blocks == (9 if role == "decode" else None)
        assert plan.resources == {"CPU": 1.0, "GPU": 1.0}


def test_the_proxy_listens_where_workers_look_for_it() -> None:
    """Guards the key too: it is in no command line, which other users of a machine can read."""
    plan = proxy_plan(SETTINGS, "10.0.0.1")
    proxy = _parsed(ProxySettings, plan)
    assert (proxy.control_address, proxy.port, proxy.orphan_s) == ("tcp://10.0.0.1:5570", 8001, 7.0)
    assert proxy.served_model_name == ("demo",) and plan.env == {KEY_VARIABLE: "k"}
    assert "k" not in plan.arguments


@pytest.mark.parametrize(("prefill", "expected"), [(0, "always"), (1, "auto")])
def test_decode_workers_prefill_where_no_other_does(prefill: int, expected: str) -> None:
    plan = proxy_plan(RaySettings(prefill=prefill), "10.0.0.1")
    assert _parsed(ProxySettings, plan).local_prefill == expected


def test_an_address_of_ipv6_is_in_brackets() -> None:
    plan = worker_plan(SETTINGS, "decode", 0, "fd00::1", on_gpu=False)
    assert "tcp://[fd00::1]:5570" in plan.arguments
    assert "tcp://[fd00::2]:0" in plan.command("fd00::2", "/run/secret")


def test_no_bundle_is_empty() -> None:
    """Guards a worker on a GPU with --worker-cpus 0, and one without either: Ray refuses empty bundles."""
    plan = worker_plan(RaySettings(worker_cpus=0.0), "decode", 0, "10.0.0.1", on_gpu=False)
    assert plan.resources
