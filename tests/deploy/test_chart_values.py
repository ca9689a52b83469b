"""Values of the chart: errors in them are refused, all options of the nodes are known, and upgrades change no more than
their values do."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml

from baton.scripts import chart_options
from baton.tests.deploy.chart import CHART, FULLNAME, Object, options, pod_templates, render, template

pytestmark = pytest.mark.deploy

KEPT = ("secret.existingSecret=s", "apiKeys.existingSecret=k")
"""Else each rendering without a cluster makes new secrets."""


@pytest.mark.parametrize(
    "setting",
    [
        "replicas=3",  # unknown names, at each depth
        "prefill.replica=3",
        "prefill.pod.tolerations[0].efect=NoSchedule",
        "store.ramGib=3",
        "autoscaling.keda.pollingInterval=3",
        "prefill.options.max-num-seq=8",  # no option of the node
        "decode.options.policy=sjf",  # another node's
        "proxy.options.port=80",  # the chart's own
        "prefill.replicas=-1",  # values
        "proxy.replicas=0",
        "proxy.replicas=two",
        "device=gpu",
        "prefill.rollout=fast",
        "workload=job",
        "decode.options.max-num-seqs=100000",
        "prefill.options.policy=lifo",
        "prefill.resources.limits.memory=2gigs",
        "autoscaling.signals={cpu}",
        "monitoring.interval=often",
        "model.volume.hostPath.path=models",
        "fullnameOverride=a-name-that-is-longer-than-thirty-six",
        "image.pullSecrets={Wrong_Name}",
    ],
)
def test_errors_are_refused(setting: str) -> None:
    """Guards against a value that is silently ignored, or fails in a pod an hour later."""
    done = template("--set", setting)
    assert done.returncode != 0
    assert "values don't meet the specifications" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("autoscaling.enabled=true,workload=disaggregatedset", "needs workload: deployment"),
        ("autoscaling.enabled=true,autoscaling.decode.minReplicas=9", "more than maxReplicas"),
        ("workload=disaggregatedset,prefill.replicas=0", "0 replicas for both roles"),
        ("workload=disaggregatedset,roles=adaptive", "needs roles: fixed"),
        ("prefill.stages=2,device=cuda", "prefill.stages needs device: cpu"),
        ("prefill.stages=2,roles=adaptive", "prefill.stages needs roles: fixed"),
        ("prefill.stages=2,prefill.options.pp=2", "prefill.stages sets prefill.options.pp"),
        ("gateway.enabled=true", "needs gateway.parentRefs"),
        (
            "gateway.enabled=true,gateway.parentRefs[0].name=g,gateway.inferencePool.enabled=true",
            "needs gateway.inferencePool.endpointPicker.name",
        ),
        ("store.enabled=true,store.diskGiB=9", "needs store.diskHostPath"),
        ("tenants.existingSecret=t,apiKeys.existingSecret=k", "leave out apiKeys.existingSecret"),
    ],
)
def test_contradictions_are_refused_with_a_reason(settings: str, reason: str) -> None:
    """Guards against values that each are right, and together install what does not work."""
    done = template("--set", settings)
    assert done.returncode != 0 and reason in done.stderr, done.stderr


def test_options_are_those_of_the_nodes() -> None:
    """Guards against an option that users of the chart cannot give, and one that no longer exists."""
    text = chart_options.SCHEMA.read_text()
    wanted = chart_options.text_of(chart_options.with_options(json.loads(text)))
    assert text == wanted, "run: python3 -m baton.scripts.chart_options"


def test_each_value_has_a_default() -> None:
    """Guards against a value that the schema admits and values.yaml, which users read, does not show."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert list(missing(values, schema, schema, "")) == [".global"]  # Helm's own


def missing(values: Object, part: Any, schema: Any, path: str) -> Any:
    """Names of closed objects that have no default; objects with one of several contents, or the user's names, may be
    empty."""
    if "$ref" in part:
        part = schema["definitions"][part["$ref"].rpartition("/")[2]]
    for name, each in part.get("properties", {}).items():
        if name not in values:
            yield f"{path}.{name}"
        elif isinstance(values[name], dict) and values[name]:
            yield from missing(values[name], each, schema, f"{path}.{name}")


@pytest.mark.parametrize(
    ("setting", "changed"),
    [
        ("decode.replicas=7", {("Deployment", f"{FULLNAME}-decode")}),
        ("prefill.options.max-num-seqs=99", {("Deployment", f"{FULLNAME}-prefill")}),
        ("proxy.options.max-queue=99", {("StatefulSet", f"{FULLNAME}-proxy")}),
        ("monitoring.interval=30s", {("ServiceMonitor", FULLNAME)}),
        ("service.port=81", {("Service", FULLNAME), ("Pod", f"{FULLNAME}-test")}),
        (
            "proxy.replicas=3",  # workers are started with the addresses of all proxies
            {
                ("StatefulSet", f"{FULLNAME}-proxy"),
                ("Deployment", f"{FULLNAME}-prefill"),
                ("Deployment", f"{FULLNAME}-decode"),
            },
        ),
    ],
)
def test_an_upgrade_changes_what_its_values_change(setting: str, changed: set[tuple[str, str]]) -> None:
    """Guards against an upgrade that restarts pods which it does not concern."""
    before, after = by_name(render("gpu", *KEPT)), by_name(render("gpu", *KEPT, setting))
    assert before == by_name(render("gpu", *KEPT, "nameOverride=baton"))  # another rendering of the same values
    assert {name for name in before | after if before.get(name) != after.get(name)} == changed


def by_name(objects: list[Object]) -> dict[tuple[str, str], Object]:
    found = {(each["kind"], each["metadata"]["name"]): each for each in objects}
    assert len(found) == len(objects)
    return found


def test_a_new_version_of_the_chart_alone_restarts_nothing() -> None:
    """Guards against labels in pods that change with every release of the chart."""
    for each in render("gpu"):
        pods = each["spec"].get("template") if "spec" in each else None
        if pods is not None:
            assert not {"helm.sh/chart", "app.kubernetes.io/version"} & set(pods["metadata"]["labels"])


def test_options_are_written_as_the_nodes_read_them() -> None:
    """Guards against 1.048576e+06, which is how Helm writes a whole number that it has read."""
    settings = "prefill.options.max-num-batched-tokens=1048576,prefill.options.plane={shm,zmq}"
    done = template("--set", f"{settings},prefill.options.deterministic=true,decode.options.deterministic=false")
    assert done.returncode == 0, done.stderr
    for argument in ('"--max-num-batched-tokens=1048576"', '"--plane=shm"', '"--plane=zmq"'):
        assert argument in done.stdout
    assert done.stdout.count("--deterministic") == 1


def revisions(*settings: str) -> set[str]:
    pods = pod_templates(render("gpu", *settings))
    return {options(pods[role])["--revision"][0] for role in ("prefill", "decode")}


def test_a_revision_is_that_of_both_roles() -> None:
    """Guards against workers that are never paired, and against pairs of two versions in the middle of an update."""
    (usual,) = revisions()
    for setting in ("image.tag=next", "model.name=org/other", "decode.options.dtype=float32"):
        (changed,) = revisions(setting)
        assert changed != usual
    assert revisions("decode.replicas=9", "prefill.options.max-num-seqs=9", "logLevel=debug") == {usual}
    assert revisions("revision=blue") == {"blue"}
