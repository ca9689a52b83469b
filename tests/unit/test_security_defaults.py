"""What a cluster shows to others unless its user says otherwise: addresses, command lines, files, and calls to hosts.

The processes themselves are looked at in tests/integration/test_exposure.py.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from baton.decode.settings import DecodeSettings
from baton.kvtransfer.store.settings import StoreSettings
from baton.launch import local
from baton.launch.local import ServeSettings
from baton.node.addresses import listen_host
from baton.node.errors import SettingsError
from baton.prefill.settings import PrefillSettings
from baton.proxy.settings import ProxySettings

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"tcp://|\d+\.\d+\.\d+\.\d+|localhost|::|\*")
SECRETS = ("sk-first", "sk-second")
CALLS_HOME = f"""
import contextlib, socket, sys
calls = []
watched = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
sys.addaudithook(lambda event, args: calls.append((event, args[1:])) if event in watched else None)
import torch, zmq, msgspec, fastapi, uvicorn, uvloop, httptools, jinja2, tokenizers, safetensors, lmdb, xxhash
import huggingface_hub, prometheus_client, pydantic
import baton.proxy.__main__, baton.prefill.__main__, baton.decode.__main__, baton.kvtransfer.__main__
from pathlib import Path
from baton.models.checkpoint import Checkpoint
from baton.proxy.text.model_text import ModelText
folder = Path({str(ROOT / "models" / "demo")!r})
ModelText(folder).close()
Checkpoint.open(folder)
print(calls)
with contextlib.suppress(OSError):
    socket.create_connection(("127.0.0.1", 9), 0.1)
print(calls)
"""


def is_loopback(address: str) -> bool:
    """Whether a host, or the host of a ZeroMQ address, is an address of the loopback interface."""
    host = address.removeprefix("tcp://").partition(":")[0]
    return host == "localhost" or ipaddress.ip_address(host).is_loopback


@pytest.mark.parametrize("settings", [ProxySettings, PrefillSettings, DecodeSettings, StoreSettings, ServeSettings])
def test_every_default_address_is_of_this_machine(settings: type) -> None:
    """Guards against a role that other machines reach because nothing was said."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    assert defaults["insecure_network"] is False
    addresses = [text for text in defaults.values() if isinstance(text, str) and ADDRESS.search(text)]
    assert addresses, "the search finds nothing"
    assert [address for address in addresses if not is_loopback(address)] == []


def test_the_nodes_of_serve_are_on_loopback() -> None:
    """Guards the command lines that `serve` makes, which could differ from the defaults of the roles."""
    ports = local.Ports((777, 778), 779, Path("secret"), Path("group"))
    specs = local.plan_nodes(ServeSettings(prefill=2, decode=2, proxies=2), ports, {}, {})
    assert {spec.group for spec in specs} == {"proxy", "store", "prefill", "decode"}
    for spec in specs:
        assert "--insecure-network" not in spec.argv and "--secret-file" in spec.argv
        for argument in spec.argv:
            assert not argument.startswith("tcp://") or is_loopback(argument), spec.argv
            assert not re.search(r"0\.0\.0\.0|tcp://\*|\[::\]", argument), spec.argv


@pytest.mark.parametrize("host", ["", "*", "0.0.0.0", "[::]", "::"])
def test_no_plane_is_bound_to_all_addresses(host: str) -> None:
    """Guards the data planes, which take the host of a worker's control socket and could take a wildcard."""
    with pytest.raises(SettingsError):
        listen_host(f"tcp://{host}:0")


def test_no_key_is_in_a_command_line_of_serve(tmp_path: Path) -> None:
    """Guards the keys of all sources from the other users of the machine, who can read command lines."""
    file = tmp_path / "keys"
    file.write_text(f"{SECRETS[1]}\n")
    settings = ServeSettings(api_key=(SECRETS[0],), api_key_file=file, proxies=2)
    ports = local.Ports((777, 778), 779, tmp_path / "secret", tmp_path)
    specs = local.plan_nodes(settings, ports, {}, {"BATON_API_KEY": SECRETS[0]})
    for spec in specs:
        assert not any(secret in argument for argument in spec.argv for secret in SECRETS), spec.argv
        if spec.group != "proxy":
            assert not any(secret in value for value in spec.env.values() for secret in SECRETS), spec.name


def test_nothing_calls_home() -> None:
    """Guards against telemetry in a library: with all of them imported, no name was looked up and no peer called."""
    ran = subprocess.run([sys.executable, "-P", "-c", CALLS_HOME], capture_output=True, text=True, timeout=240)
    lines = ran.stdout.splitlines()
    assert lines[:1] == ["[]"], ran.stdout + ran.stderr
    assert "socket.connect" in lines[1], "the hook sees nothing"


def test_every_dependency_comes_from_the_index_by_name_and_bound() -> None:
    """Guards against code from a repository's branch, and against a version older than the one that was looked at."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (each for each in lists for each in each):
        assert re.match(r"[a-z0-9_-]+(\[[a-z]+\])?>=\d", requirement, re.IGNORECASE), requirement
        assert "@" not in requirement and "://" not in requirement, requirement
