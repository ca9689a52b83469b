"""A peer that is addressed by name and comes back at another address is found again, as a restarted pod is.

The child has a /etc/hosts of its own, in a mount namespace; it looks names up as any process does.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import socket
import sys
import time
from pathlib import Path

from baton.node.credentials import Credentials
from baton.node.endpoint import Endpoint
from baton.node.messages.control import Drain, Rejoin
from baton.node.sockets import Context

PATIENCE_S = 60.0
hosts = Path("/etc/hosts")


def proxy_at(address):
    hosts.write_text(f"{address} moving-proxy.example\\n")
    return Endpoint(proxy_context, "proxy", f"tcp://{address}:{port}")


def until_heard(proxy):
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        worker.send("proxy", Drain())
        worker.receive(0.0)
        if proxy.receive(0.05):
            return
    sys.exit("the worker was not heard")


with socket.create_server(("127.0.0.2", 0)) as listener:
    port = listener.getsockname()[1]
hosts.write_text("")
proxy_context, worker_context = Context(Credentials("proxy")), Context(Credentials("decode"))
worker = Endpoint(worker_context, "decode/1", None)
worker.connect("proxy", f"tcp://moving-proxy.example:{port}", "proxy")  # a name that nothing has yet
worker.receive(0.05)
for address in ("127.0.0.2", "127.0.0.3"):
    proxy = proxy_at(address)
    until_heard(proxy)
    proxy.close()
worker.close()
"""


def in_own_mounts(hosts: Path, *command: str) -> list[str]:
    """`command` in a mount namespace where this file is /etc/hosts."""
    script = 'mount --bind "$0" /etc/hosts && exec "$@"'
    return ["unshare", "--mount", "sh", "-c", script, str(hosts), *command]


def test_a_name_is_looked_up_again_when_its_address_has_moved(tmp_path: Path) -> None:
    """Guards a restarted proxy of Kubernetes: its name is the same, its address another."""
    hosts = tmp_path / "hosts"
    hosts.touch()
    if shutil.which("unshare") is None or subprocess.run(in_own_mounts(hosts, "true"), capture_output=True).returncode:
        pytest.skip("this machine lets no process have mounts of its own (unshare --mount)")
    ended = subprocess.run(in_own_mounts(hosts, sys.executable, "-P", "-c", CHILD), capture_output=True, timeout=150)
    assert ended.returncode == 0, ended.stderr.decode()
