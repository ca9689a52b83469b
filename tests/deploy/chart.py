"""Renders the Helm chart, and looks into what it renders. It judges nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from baton.tests.deploy.tools import tools

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CHART = ROOT / "deploy" / "helm" / "baton"
EXAMPLES = tuple(sorted(path.stem for path in (ROOT / "deploy" / "helm" / "values").glob("*.yaml")))
RELEASE, NAMESPACE = "demo", "llm"
FULLNAME = "demo-baton"
WORKLOADS = ("Deployment", "StatefulSet", "DaemonSet", "Pod", "DisaggregatedSet", "LeaderWorkerSet")

Object = dict[str, Any]


def helm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run helm; its status is for the caller to check."""
    return subprocess.run([tools().helm, *arguments], capture_output=True, text=True, timeout=60)


def template(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return helm("template", RELEASE, CHART, "--namespace", NAMESPACE, *arguments)


@cache
def _text(example: str, settings: tuple[str, ...]) -> str:
    file = CHART.parent / "values" / f"{example}.yaml"
    done = template("--values", file, *(part for each in settings for part in ("--set", each)))
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(example: str, *settings: str) -> list[Object]:
    """All objects of a release with the values of an example, and some of `--set`."""
    return objects_in(_text(example, settings))


def objects_in(text: str) -> list[Object]:
    """Of YAML; by its parser in C, as a dashboard takes the other a third of a second."""
    return [each for each in yaml.load_all(text, yaml.CSafeLoader) if each]


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def one(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """The pod templates of all workloads, by their component."""
    return {each["metadata"]["labels"]["app.kubernetes.io/component"]: each for each in _pod_templates(objects)}


def container(template: Object) -> Object:
    (found,) = template["spec"]["containers"]
    return dict(found)


def options(template: Object) -> dict[str, list[str]]:
    """The command line of a pod, by option."""
    found: dict[str, list[str]] = {}
    for argument in container(template)["args"]:
        name, _, value = argument.partition("=")
        found.setdefault(name, []).append(value)
    return found


def labels(template: Object) -> Object:
    return dict(template["metadata"]["labels"])


def matches(selector: Object, labels: Object) -> bool:
    return selector.items() <= labels.items()


def _pod_templates(objects: list[Object]) -> Iterator[Object]:
    for each in of_kind(objects, *WORKLOADS):
        if each["kind"] == "Pod":
            yield {"metadata": each["metadata"], "spec": each["spec"]}
        elif each["kind"] == "DisaggregatedSet":
            for role in each["spec"]["roles"]:
                yield from _pods_of_group(role["spec"]["leaderWorkerTemplate"])
        elif each["kind"] == "LeaderWorkerSet":
            yield from _pods_of_group(each["spec"]["leaderWorkerTemplate"])
        else:
            yield each["spec"]["template"]


def _pods_of_group(group: Object) -> Iterator[Object]:
    return (group[name] for name in ("leaderTemplate", "workerTemplate") if name in group)
