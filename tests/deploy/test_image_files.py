"""The Dockerfile and the Compose files: true of the code as it is. test_containers.py runs them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from baton.decode.settings import DecodeSettings
from baton.kvtransfer.store.settings import StoreSettings
from baton.node.settings import parse
from baton.prefill.settings import PrefillSettings
from baton.proxy.settings import ProxySettings
from baton.tests.deploy.compose import FILES, FOLDER, ROOT, instructions, nodes, services
from baton.worker.stages.remote.settings import StageSettings

pytestmark = pytest.mark.deploy

SETTINGS: dict[str, type[Any]] = {
    "proxy": ProxySettings,
    "prefill": PrefillSettings,
    "decode": DecodeSettings,
    "store": StoreSettings,
    "stage": StageSettings,
}
OURS = re.compile(r"baton(:\w+)?")


def test_the_image_is_built_from_all_packages_and_nothing_else() -> None:
    """Guards the image against a new package that is missing, and against secrets and tests of a checkout."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {name.split(".")[1] for name in packages if "." in name}
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    assert rules[0] == "*" and allowed >= folders
    assert allowed - folders == {"LICENSE", "README.md", "pyproject.toml", "__init__.py", "__main__.py", "cli.py"}


def test_the_dockerfile_is_plain_and_ends_without_root() -> None:
    """Guards builds without BuildKit, and clusters that refuse images of root."""
    found = instructions()
    assert {name for name, _ in found} <= {
        *("ARG", "FROM", "RUN", "COPY", "ENV", "LABEL", "USER", "WORKDIR", "VOLUME", "EXPOSE", "STOPSIGNAL"),
        *("ENTRYPOINT", "CMD"),
    }
    assert not [rest for _, rest in found if re.search(r"--mount|--chmod|--link|<<", rest)]
    assert [rest for name, rest in found if name == "USER"] == ["10001:10001"]
    assert ("STOPSIGNAL", "SIGTERM") in found and ("ENTRYPOINT", '["baton"]') in found


def test_every_argument_of_the_build_is_described_and_used() -> None:
    """Guards `--build-arg` of the documentation and of the Compose files: one that is unknown is ignored."""
    known = {rest.partition("=")[0] for name, rest in instructions() if name == "ARG"}
    comment = (FOLDER / "Dockerfile").read_text().partition("\nARG")[0]
    assert {name for name in known if name not in comment} == set()
    for file in FILES:
        for service in services(file).values():
            assert service.get("build", {}).get("args", {}).keys() <= known


@pytest.mark.parametrize("file", FILES)
def test_every_command_is_one_that_its_node_takes(file: str) -> None:
    """Guards against an option that was renamed: a container that ends at once, again and again."""
    found = nodes(file)
    assert found.keys() >= {"prefill", "decode"}
    for service in found.values():
        node, *arguments = service["command"]
        settings = parse(SETTINGS[node], arguments, prog=node, description="", environ={})
        if node != "proxy":
            assert (
                settings.probe_port == 8080
                and ":8080/ready" in services("compose.yaml")[node]["healthcheck"]["test"][3]
            )
            assert float(services("compose.yaml")[node]["stop_grace_period"].rstrip("s")) > getattr(
                settings, "drain_s", 0
            )


def test_every_container_is_as_small_as_it_can_be() -> None:
    """Guards against a container that could write its root or gain rights."""
    ours = {name: each for name, each in services("compose.yaml").items() if OURS.fullmatch(each["image"])}
    assert ours.keys() == {"secret", "pids", "proxy", "store", "prefill", "decode"}
    for name, service in ours.items():
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"user", "privileged", "cap_add", "network_mode"}, name
    ports = [port for service in services("compose.yaml").values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports), "other machines reach no port unasked"


def test_monitoring_uses_the_files_of_the_documentation() -> None:
    """Guards the dashboard and the alerts against copies that grow old."""
    mounts = [mount for name in ("prometheus", "grafana") for mount in services("compose.yaml")[name]["volumes"]]
    files = [FOLDER / mount.split(":")[0] for mount in mounts if mount.startswith(".")]
    assert all(file.is_file() for file in files)
    assert {file.resolve().name for file in files} >= {"prometheus.yml", "alerts.yml", "grafana.json"}


@pytest.mark.parametrize("files", [("compose.yaml",), FILES])
def test_compose_reads_the_files(files: tuple[str, ...], tmp_path: Path) -> None:
    """Guards the files' form by the tool itself."""
    command = ["docker", "compose"] if _has_plugin() else ["docker-compose"]
    if shutil.which(command[0]) is None:
        pytest.skip("neither docker's plugin compose nor docker-compose is on the PATH")
    named = [part for file in files for part in ("-f", str(FOLDER / file))]
    done = subprocess.run([*command, *named, "config", "-q"], capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 0, done.stderr


def _has_plugin() -> bool:
    docker = shutil.which("docker")
    return docker is not None and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0
