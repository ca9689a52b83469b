"""The pods that the chart renders start the nodes as their settings say: options, addresses, ports, probes, drains."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest

from baton.node.settings import parse
from baton.scripts.chart_options import NODES
from baton.tests.deploy.chart import (
    EXAMPLES,
    FULLNAME,
    NAMESPACE,
    Object,
    container,
    labels,
    matches,
    of_kind,
    one,
    options,
    pod_templates,
    render,
)

pytestmark = pytest.mark.deploy

LEADER = "demo-baton-prefill-1.demo-baton-prefill.llm"
AFTER_DRAIN_S = 20
"""What a node takes beyond its drain, and some more: SIGKILL must never cut a drain short."""


def nodes_of(example: str) -> list[tuple[str, Object]]:
    """Component and pod template of each node."""
    return [each for each in pod_templates(render(example)).items() if each[0] != "test"]


def settings_of(component: str, template: Object) -> Any:
    """The node's settings, out of the arguments of its container; ends the process where they are wrong."""
    given = container(template)["args"]
    variables = {"$(POD_IP)": "10.1.2.3", "$(POD_NAME)": "pod-1", "$(LWS_LEADER_ADDRESS)": LEADER}
    arguments = [reduce(lambda text, each: text.replace(*each), variables.items(), argument) for argument in given]
    return parse(NODES[program_of(component)], arguments, "baton", "", environ={})


def program_of(component: str) -> str:
    return "decode" if component == "mixed" else component


def probe_ports(template: Object) -> set[int]:
    named = {each["name"]: each["containerPort"] for each in container(template)["ports"]}
    probes = ("startupProbe", "livenessProbe", "readinessProbe")
    return {named[container(template)[probe]["httpGet"]["port"]] for probe in probes}


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("example", EXAMPLES)
def test_each_node_takes_its_command_line(example: str) -> None:
    """Guards against an option that does not exist, or a value that its node refuses: a pod that never starts."""
    for component, template in nodes_of(example):
        assert container(template)["command"] == ["baton", program_of(component)]
        settings = settings_of(component, template)
        assert settings.secret_file == Path("/etc/baton/cluster/secret")
        repeated = {name for name, values in options(template).items() if len(values) > 1}
        assert all(isinstance(getattr(settings, name[2:].replace("-", "_")), tuple) for name in repeated)


@pytest.mark.parametrize("example", EXAMPLES)
def test_ports_agree(example: str) -> None:
    """Guards against a probe, a Service or a peer that asks at a port where nothing listens."""
    objects = render(example)
    for component, template in nodes_of(example):
        settings = settings_of(component, template)
        ports = {each["name"]: each["containerPort"] for each in container(template)["ports"]}
        if component == "proxy":
            assert ports == {"http": settings.port, "control": port_of(settings.control_address)}
            assert probe_ports(template) == {settings.port}
        else:
            assert probe_ports(template) == {settings.probe_port} == {ports["probe"]}
        if component == "store":
            assert ports["store"] == port_of(settings.bind)
    for service in of_kind(objects, "Service"):
        pods = [each for each in pod_templates(objects).values() if matches(service["spec"]["selector"], labels(each))]
        assert len(pods) == 1, service["metadata"]["name"]
        names = {each["name"] for each in container(pods[0])["ports"]}
        assert all(each["targetPort"] in names for each in service["spec"]["ports"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_workers_know_every_proxy_by_a_name_that_exists(example: str) -> None:
    """Guards against a worker that joins some proxies only: the others would not know it, or have no worker at all."""
    objects = render(example)
    (proxies,) = of_kind(objects, "StatefulSet")
    control = one(objects, "Service", proxies["spec"]["serviceName"])
    assert control["spec"]["clusterIP"] == "None" and control["spec"]["publishNotReadyAddresses"]
    (port,) = [each["port"] for each in control["spec"]["ports"]]
    wanted = tuple(
        f"tcp://{proxies['metadata']['name']}-{index}.{control['metadata']['name']}.{NAMESPACE}.svc:{port}"
        for index in range(proxies["spec"]["replicas"])
    )
    for component, template in nodes_of(example):
        if component not in ("proxy", "stage"):
            assert settings_of(component, template).proxy == wanted


def test_workers_use_the_store_of_their_node() -> None:
    """Guards against a worker that asks another node's store, whose memory it cannot map."""
    objects = render("store")
    service = one(objects, "Service", f"{FULLNAME}-store")
    assert service["spec"]["internalTrafficPolicy"] == "Local"
    address = f"tcp://{FULLNAME}-store.{NAMESPACE}.svc:{service['spec']['ports'][0]['port']}"
    pods = pod_templates(objects)
    for role in ("prefill", "decode"):
        assert settings_of(role, pods[role]).store == address
        assert pods[role]["spec"]["hostPID"] and pods["store"]["spec"]["hostPID"]
    assert not any("hostPID" in each["spec"] for each in pod_templates(render("gpu")).values())


@pytest.mark.parametrize("settings", [("stages",), ("disaggregatedset", "prefill.stages=3")], ids=lambda each: each[0])
def test_stages_join_the_first_one_of_their_group(settings: tuple[str, ...]) -> None:
    """Guards against a group of another size than its worker waits for, and an address at which no worker listens."""
    objects = render(*settings)
    pods = pod_templates(objects)
    worker, stage = (settings_of(component, pods[component]) for component in ("prefill", "stage"))
    (found,) = of_kind(objects, "LeaderWorkerSet") or of_kind(objects, "DisaggregatedSet")
    roles = found["spec"].get("roles") or [{"spec": found["spec"]}]
    groups = [each["spec"]["leaderWorkerTemplate"] for each in roles]
    assert groups[0]["size"] == worker.pp == 3 and all(each["size"] == 1 for each in groups[1:])
    assert "leaderTemplate" in groups[0] and groups[0]["restartPolicy"] == "None"
    assert stage.first == f"tcp://{LEADER}:{port_of(worker.stages_bind)}"
    assert stage.model == worker.model
    assert "stage" not in pod_templates(render("demo")) and not options(pod_templates(render("demo"))["prefill"]).get(
        "--pp"
    )


@pytest.mark.parametrize("example", EXAMPLES)
def test_kubernetes_waits_for_drains(example: str) -> None:
    """Guards against SIGKILL in the middle of a drain, which breaks the requests that it waits for."""
    for component, template in nodes_of(example):
        before_s = container(template).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drains = "prefill" if component == "stage" else component  # SIGTERM to a stage drains its worker
        drain_s = 0 if component == "store" else settings_of(drains, pod_templates(render(example))[drains]).drain_s
        assert template["spec"]["terminationGracePeriodSeconds"] >= before_s + drain_s + AFTER_DRAIN_S
        assert bool(before_s) == (component == "proxy")  # a worker tells the proxies before anything else


def test_probes_tell_dead_from_starting_from_draining() -> None:
    """Guards against pods that are killed while they load a model or have no workers yet, and against liveness that
    computes tokens, which a full queue would fail."""
    for component, template in nodes_of("store"):
        probes = container(template)
        paths = {name: probes[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
        assert paths == {"startup": "/live", "liveness": "/live", "readiness": "/ready"}, component
