"""The chart as a whole: its version, its package, its notes, and names of any length."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from baton import __version__
from baton.tests.deploy.chart import (
    CHART,
    NAMESPACE,
    WORKLOADS,
    container,
    helm,
    objects_in,
    of_kind,
    options,
    pod_templates,
    render,
)

pytestmark = pytest.mark.deploy


def test_versions_agree() -> None:
    """Guards against a chart that installs another version of Baton than the one that it was made with."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == __version__
    assert container(pod_templates(render("demo"))["proxy"])["image"] == f"baton:{__version__}-cpu"
    assert container(pod_templates(render("gpu"))["decode"])["image"] == f"registry.example.com/baton:{__version__}"


def test_gpus_are_asked_for() -> None:
    """Guards against a worker without the device that it is to run on."""
    for example, limits in (("gpu", {"nvidia.com/gpu": 1}), ("keda", {"nvidia.com/gpu": 1}), ("demo", {})):
        pods = pod_templates(render(example))
        for role in ("prefill", "decode"):
            assert container(pods[role])["resources"]["limits"] == limits
            assert (options(pods[role])["--device"] == ["cuda"]) == bool(limits)


def test_long_names_fit() -> None:
    """Guards against a worker that is refused since its name, that of its pod, has more than 64 characters."""
    done = helm("template", "r" * 53, CHART, "--set", "monitoring.enabled=true,store.enabled=true")
    assert done.returncode == 0, done.stderr
    for each in of_kind(objects_in(done.stdout), *WORKLOADS):
        assert len(each["metadata"]["name"] + "-0123456789-01234") <= 64
    for each in objects_in(done.stdout):
        assert all(len(value) <= 63 for value in each["metadata"]["labels"].values())


def test_the_package_is_complete(tmp_path: Path) -> None:
    """Guards against a package whose links to files of the repository are broken outside of it."""
    done = helm("package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    arguments = (
        "--namespace",
        NAMESPACE,
        "--set",
        "monitoring.enabled=true,secret.existingSecret=s,apiKeys.enabled=false",
    )
    packed = helm("template", "demo", tmp_path / f"baton-{__version__}.tgz", *arguments)
    assert packed.returncode == 0 and packed.stdout == helm("template", "demo", CHART, *arguments).stdout


@pytest.mark.parametrize("example", ["gpu", "gateway", "store"])
def test_the_notes_are_shown(example: str) -> None:
    """Guards against notes that do not render: an installation would fail at its very end."""
    done = helm(
        *("install", "demo", CHART, "--dry-run=client", "--namespace", NAMESPACE),
        *("--values", CHART.parent / "values" / f"{example}.yaml"),
    )
    assert done.returncode == 0, done.stderr
    assert "NOTES:" in done.stdout and "curl http://127.0.0.1:8000/v1/models" in done.stdout.partition("NOTES:")[2]
