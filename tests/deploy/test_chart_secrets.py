"""The Secrets of the chart: nodes can read them, and an upgrade keeps them."""

from __future__ import annotations

import base64
import os
import tempfile
from pathlib import Path

import pytest

from baton.node.api_settings import ApiSettings, api_keys
from baton.node.secret_file import read_secret
from baton.tests.deploy.chart import (
    FULLNAME,
    NAMESPACE,
    RELEASE,
    Object,
    objects_in,
    of_kind,
    one,
    pod_templates,
    render,
    template,
)
from baton.tests.deploy.fake_api import cluster_with

pytestmark = pytest.mark.deploy

CLUSTER, KEYS = f"{FULLNAME}-secret", f"{FULLNAME}-api-keys"


def decoded(secret: Object) -> dict[str, str]:
    return {name: base64.b64decode(value).decode() for name, value in secret["data"].items()}


def rendered(kubeconfig: Path, *arguments: str) -> list[Object]:
    """The Secrets of the release as an upgrade renders them."""
    against = ("--dry-run=server", "--disable-openapi-validation", "--is-upgrade", "--kubeconfig", kubeconfig)
    done = template(*against, *arguments)
    assert done.returncode == 0, done.stderr
    return of_kind(objects_in(done.stdout), "Secret")


def installed(name: str, **data: str) -> Object:
    """As `helm install` leaves it."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {"app.kubernetes.io/managed-by": "Helm"},
            "annotations": {"meta.helm.sh/release-name": RELEASE, "meta.helm.sh/release-namespace": NAMESPACE},
        },
        "data": {key.replace("_", "-"): base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }


def test_nodes_read_what_is_generated(tmp_path: Path) -> None:
    """Guards against a secret of another form than nodes take, and one key for all installations."""
    first, second = (
        of_kind(render("disaggregatedset", f"test.activeDeadlineSeconds={number}"), "Secret") for number in (1, 2)
    )
    secrets = []
    for objects in (first, second):
        file = tmp_path / "secret"
        file.touch(0o600)
        file.write_text(decoded(one(objects, "Secret", CLUSTER))["secret"])
        secrets.append(read_secret(file))
    assert len(secrets[0]) == 32 and secrets[0] != secrets[1]
    keys = decoded(one(first, "Secret", KEYS))
    (tmp_path / "keys").write_text(keys["api-keys"])
    assert api_keys(ApiSettings(api_key_file=tmp_path / "keys")) == (keys["api-key"],)
    assert len(keys["api-key"]) == 40 and keys != decoded(one(second, "Secret", KEYS))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of root, and become another user")
def test_a_pods_user_reads_what_a_kubelet_mounts() -> None:
    """Guards against a mode or an owner that nodes refuse: files of Secrets are root's, and fsGroup may read them."""
    (volume,) = [
        each
        for each in pod_templates(render("gpu"))["decode"]["spec"]["volumes"]
        if each.get("secret", {}).get("secretName") == CLUSTER
    ]
    identity = pod_templates(render("gpu"))["decode"]["spec"]["securityContext"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        file = Path(folder, "secret")
        file.write_text("ab" * 32)
        os.chown(file, 0, identity["fsGroup"])
        file.chmod(volume["secret"]["defaultMode"])
        os.setegid(identity["fsGroup"])
        os.seteuid(identity["runAsUser"])
        try:
            assert read_secret(file) == bytes.fromhex("ab" * 32)
        finally:
            os.seteuid(0)
            os.setegid(0)


def test_an_upgrade_keeps_the_secrets_of_the_cluster(tmp_path: Path) -> None:
    """Guards against an upgrade with new secrets: its pods would refuse those that run, and clients their keys."""
    there = [
        installed(CLUSTER, secret="ab" * 32),
        installed(KEYS, api_key="mine", api_keys="mine\nof-a-friend\n"),
    ]
    with cluster_with(there, tmp_path) as kubeconfig:
        found = rendered(kubeconfig)
    assert {each["metadata"]["name"]: each["data"] for each in found} == {
        each["metadata"]["name"]: each["data"] for each in there
    }


def test_a_cluster_without_them_gets_new_ones(tmp_path: Path) -> None:
    """Guards the test above: it is the cluster's Secrets that make the difference."""
    with cluster_with([], tmp_path) as kubeconfig:
        first, second = rendered(kubeconfig), rendered(kubeconfig)
    assert len(first) == 2 and all(
        before.get("data") != after.get("data") for before, after in zip(first, second, strict=True)
    )


def test_secrets_of_users_are_left_alone() -> None:
    """Guards against a Secret that is made beside the one that a user has named."""
    objects = render("hpa")
    assert not of_kind(objects, "Secret")
    assert not [each for each in of_kind(render("gateway"), "Secret") if each["metadata"]["name"] == KEYS]
