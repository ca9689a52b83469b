"""What a running cluster shows to its machine and network: listening sockets, command lines, files, logs, TLS."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from baton.launch import cluster as launch
from baton.launch.local import ServeSettings
from baton.node.tls import own_server_context
from baton.tests.certificate import make_certificate
from baton.tests.integration.cluster import LISTEN, Cluster, start_node

KEY = "sk-2f8e6a1c9d"
PROMPT = "Zanzibar and the quokka"
NODES = ("proxy", "store", "prefill-0", "decode-0")

pytestmark = pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exposure")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    """As talkative as it gets, with a key, and with a disk that has blocks of a prompt."""
    umask = os.umask(0)  # the most permissive: what is private is so by itself
    store_args = ("--disk-gib", "0.05", "--path", str(folder / "kvstore"), "--log-level", "debug")
    made = Cluster(
        api_key=KEY,
        store_args=store_args,
        proxy_args=("--local-prefill", "never", "--log-level", "debug", "--access-log", "--debug-requests", "16"),
        worker_args=("--log-level", "debug"),
        log_folder=folder,
        forked=False,  # command lines and environments are looked at
    )
    try:
        with made as running:
            running.complete(PROMPT, max_tokens=24, user="zanzibar-user", cache_salt="zanzibar-salt")
            wrong = {"model": PROMPT, "prompt": PROMPT, PROMPT: PROMPT, "max_tokens": PROMPT}
            headers = {"Authorization": f"Bearer {KEY}"}
            assert httpx.post(f"{running.url}/v1/completions", json=wrong, headers=headers).status_code == 400
            yield running
    finally:
        os.umask(umask)


def test_every_socket_that_listens_is_on_loopback(cluster: Cluster) -> None:
    """CVE-2025-32444, CVE-2025-30202, CVE-2026-7301 and CVE-2026-107206: sockets that were bound to all addresses."""
    found = 0
    for name in NODES:
        links = [os.readlink(entry) for entry in Path(f"/proc/{cluster.nodes.pid(name)}/fd").iterdir()]
        inodes = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[9] in inodes and fields[3] == LISTEN:
                    found += 1
                    assert address_of(fields[1].partition(":")[0]).is_loopback, (name, line)
    assert found >= len(NODES)


def address_of(digits: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The address in /proc/net/tcp or tcp6, which has words in the order of the machine."""
    words = [bytes.fromhex(digits[at : at + 8])[::-1] for at in range(0, len(digits), 8)]
    return ipaddress.ip_address(b"".join(words))


def test_no_command_line_has_a_secret(cluster: Cluster) -> None:
    """Other users of the machine can read command lines; environments they cannot."""
    for name in NODES:
        folder = Path(f"/proc/{cluster.nodes.pid(name)}")
        assert KEY.encode() not in (folder / "cmdline").read_bytes(), name
        environ = dict(entry.partition(b"=")[::2] for entry in (folder / "environ").read_bytes().split(b"\0") if entry)
        assert (KEY.encode() in environ.values()) == (name == "proxy"), name
        for variable, value in environ.items():
            if b"BATON" in variable:
                assert value not in (folder / "cmdline").read_bytes(), (name, variable)
        assert not stat.S_IMODE((folder / "environ").stat().st_mode) & 0o077


def test_what_is_on_disk_is_readable_by_its_user_only(cluster: Cluster, folder: Path) -> None:
    """KV is as confidential as the prompts that it was computed from."""
    paths = [folder / "kvstore", *(folder / "kvstore").rglob("*")]
    assert any(path.is_file() for path in paths)
    top, *inside = paths
    assert not stat.S_IMODE(top.stat().st_mode) & 0o077, top
    for path in (*inside, *folder.glob("*.log")):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


def test_no_log_and_no_route_of_an_operator_has_a_prompt_or_a_key(cluster: Cluster, folder: Path) -> None:
    """CVE-2026-107206 showed the environment, and logs of other servers the prompts, to any client."""
    assert cluster.metrics()
    logs = sorted(folder.glob("*.log"))
    assert len(logs) == len(NODES)
    for path in logs:
        shown = path.read_text()
        assert shown and not any(secret in shown for secret in (KEY, "Zanzibar", "quokka", "zanzibar")), path.name
    with httpx.Client(base_url=cluster.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        for path in ("/metrics", "/health", "/ready", "/version", "/v1/models", "/tokenizer_info", "/dashboard"):
            shown = client.get(path).text
            assert not any(secret in shown for secret in (KEY, "Zanzibar", "zanzibar")), path
        for path in ("/env", "/config", "/run_script", "/debug", "/docs", "/openapi.json", "/admin"):
            assert client.get(path).status_code == 404, path


def test_old_protocols_and_ciphers_of_tls_are_refused(tmp_path: Path) -> None:
    """Guards keys and prompts on their way, whatever the defaults of Python and uvicorn become."""
    certificate, key = make_certificate(tmp_path)
    settings = ServeSettings(prefill=0, device="cpu", store_ram_gib=0, tls_cert=certificate, tls_key=key)
    with launch.Cluster(settings, start=start_node) as nodes:
        host, _, port = nodes.url.removeprefix("https://").rpartition(":")

        def handshake(version: ssl.TLSVersion, ciphers: str) -> str | None:
            context = own_server_context()
            context.minimum_version = context.maximum_version = version
            context.set_ciphers(ciphers)
            with socket.create_connection((host, int(port)), 10) as plain, context.wrap_socket(plain) as secure:
                return secure.version()

        assert handshake(ssl.TLSVersion.TLSv1_3, "DEFAULT") == "TLSv1.3"
        assert handshake(ssl.TLSVersion.TLSv1_2, "DEFAULT") == "TLSv1.2"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the constant
            with pytest.raises((ssl.SSLError, ConnectionError)):
                handshake(ssl.TLSVersion.TLSv1_1, "ALL:@SECLEVEL=0")
        for weak in ("ECDHE-ECDSA-AES128-SHA", "ECDHE-ECDSA-NULL-SHA", "AECDH-AES128-SHA"):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                handshake(ssl.TLSVersion.TLSv1_2, f"{weak}:@SECLEVEL=0")
