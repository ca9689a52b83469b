"""Every object that the chart renders is what the API server, or the controller that reads it, takes.

There is no cluster here: Kubernetes' own schemas (kubernetes-validate), those of KEDA, Gateway API and Prometheus
Operator (npm), and small closed ones (custom_resources.py) stand in for its API server.
"""

from __future__ import annotations

import copy
import json
import subprocess
from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from baton.tests.deploy.chart import CHART, EXAMPLES, HERE, Object, helm, of_kind, pod_templates, render
from baton.tests.deploy.custom_resources import SCHEMAS
from baton.tests.deploy.tools import tools

pytestmark = pytest.mark.deploy

KUBERNETES = ("1.30", "1.36")
"""The oldest that the chart admits, and a new one."""

NEEDS_NO_PACKAGE = ("DisaggregatedSet", "LeaderWorkerSet", "InferencePool")


def custom(each: Object) -> bool:
    return (each["apiVersion"], each["kind"]) in SCHEMAS


def validate(each: Object) -> None:
    """By each version; what several examples have in common only once."""
    _validate_text(json.dumps(each, sort_keys=True))


@cache
def _validate_text(text: str) -> None:
    for version in KUBERNETES:
        kubernetes_validate.validate(json.loads(text), version, strict=True)


def errors_of_packages(objects: list[Object]) -> list[str | None]:
    """What the validators of npm's packages say of each: "" is right, None unknown."""
    done = subprocess.run(
        ["node", HERE / "validate.mjs", tools().node_modules],
        input=json.dumps(objects),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


def test_lint_finds_nothing() -> None:
    """Guards against templates that helm itself complains about."""
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0 and "[WARNING]" not in done.stdout, done.stdout


@pytest.mark.parametrize("example", EXAMPLES)
def test_kubernetes_takes_each_object(example: str) -> None:
    """Guards against a field that is misspelt, in the wrong place or of another type: API servers drop or refuse it."""
    objects = [each for each in render(example) if not custom(each)]
    assert of_kind(objects, "StatefulSet")
    for each in objects:
        validate(each)


@pytest.mark.parametrize(
    ("settings", "kind", "components"),
    [
        (("disaggregatedset",), "DisaggregatedSet", {"prefill", "decode"}),
        (("disaggregatedset", "prefill.stages=2"), "DisaggregatedSet", {"prefill", "stage", "decode"}),
        (("stages",), "LeaderWorkerSet", {"prefill", "stage"}),
    ],
)
def test_pods_in_custom_resources_are_pods(settings: tuple[str, ...], kind: str, components: set[str]) -> None:
    """Guards against an error in the pod templates of a group, which its own schema leaves open."""
    found = pod_templates(of_kind(render(*settings), kind))
    assert set(found) == components
    for template in found.values():
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "p"}, "template": template}
        validate(pod)


def test_custom_resources_are_what_their_controllers_take() -> None:
    """Guards against an object that KEDA, a gateway, Prometheus Operator or LeaderWorkerSet would refuse or ignore."""
    objects = [each for example in EXAMPLES for each in render(example) if custom(each)]
    assert {each["kind"] for each in objects} == {kind for _, kind in SCHEMAS}
    for each in objects:
        jsonschema.validate(each, SCHEMAS[each["apiVersion"], each["kind"]])
    for each, error in zip(objects, errors_of_packages(objects), strict=True):
        assert error == "" or (error is None and each["kind"] in NEEDS_NO_PACKAGE), (each["kind"], error)


def test_these_validators_complain() -> None:
    """Guards the tests above: each of the validators must see an error of its kind."""
    deployment = copy.deepcopy(of_kind(render("demo"), "Deployment")[0])
    deployment["spec"]["replicaz"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(deployment)
    scaled = copy.deepcopy(of_kind(render("keda"), "ScaledObject")[0])
    scaled["spec"]["minReplicaCount"] = "two"
    assert "minReplicaCount" in (errors_of_packages([scaled])[0] or "")
    pool = copy.deepcopy(of_kind(render("inferencepool"), "InferencePool")[0])
    pool["spec"]["targetPort"] = 8000
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(pool, SCHEMAS[pool["apiVersion"], pool["kind"]])


def test_the_schema_of_values_is_closed_and_knows_each_value() -> None:
    """Guards against a value that a typing error leaves unread, and one without a default."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    open_objects = [path for path, each in walk(schema, ()) if is_open(each)]
    # Labels, annotations, environment, resources: their names are the user's. Affinity is Kubernetes' own.
    assert {path[-1] for path in open_objects} <= USERS_NAMES, open_objects


USERS_NAMES = {
    *("global", "nodeAffinity", "podAffinity", "podAntiAffinity", "quantities"),
    *("annotations", "labels", "matchLabels", "dashboardLabels", "nodeSelector", "env"),
}


def walk(schema: Any, path: tuple[str, ...]) -> Any:
    if isinstance(schema, dict):
        yield path, schema
        for name, each in schema.items():
            yield from walk(each, (*path, name))
    elif isinstance(schema, list):
        for each in schema:
            yield from walk(each, path)


def is_open(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "object" and schema.get("additionalProperties") is not False
