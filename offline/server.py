"""A server of our own: `baton serve` as a child process on a free loopback port, with a random API key.

The child reads its arguments and its key from a pipe, and ends when the pipe closes, so it cannot outlive this process,
however that ends. Its output goes to a file in a private folder. Knows no requests.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.launch.local import ServeSettings, free_ports
from baton.launch.other_options import OPTIONS_OF_OTHERS
from baton.node.modelhub import locate_model
from baton.node.private_files import private_opener
from baton.node.settings import as_arguments

OWN_SETTINGS = ("model", "host", "port", "api_key", "api_key_file", "tls_cert", "tls_key", "insecure_network")
"""Settings of `serve` that are not the caller's choice."""
TAIL_LINES = 20


class PrivateServer:
    """One running server; `close` ends all its processes and removes its folder."""

    def __init__(self, model: str, settings: Mapping[str, Any], request_timeout_s: float) -> None:
        """Starts it, without waiting until it is ready. Raises SettingsError; TypeError for an unknown setting."""
        check_names(settings)
        locate_model(model)  # a download shows its progress here, and not in the file
        self.api_key = secrets.token_urlsafe(32)
        self._folder = Path(tempfile.mkdtemp(prefix="baton-llm-"))  # readable by this user alone
        port = free_ports(1)[0]
        self.url = f"http://127.0.0.1:{port}"
        own = {"store_path": self._folder / "kvstore", "grace_s": 10.0, **settings}
        own["proxy_arg"] = (f"--request-timeout-s={request_timeout_s:g}", *strings(settings.get("proxy_arg", ())))
        argv = [f"--model={model}", f"--port={port}", *as_arguments(ServeSettings, own)]
        self.log = self._folder / "server.log"
        with open(self.log, "wb", opener=private_opener) as output:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "baton.offline.child"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C on the terminal is the caller's to handle
            )
        assert self._process.stdin is not None
        try:
            start = {"argv": argv, "api_key": self.api_key, "folder": str(self._folder)}
            self._process.stdin.write(json.dumps(start).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended already, which `ended` reports

    def ended(self) -> str:
        """Why the server is gone, with its last lines; empty while it runs."""
        if self._process.poll() is None:
            return ""
        return f"the server has ended (exit status {self._process.returncode}); its last lines:\n{self.tail()}"

    def tail(self) -> str:
        """The last lines of its output."""
        try:
            lines = self.log.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return ""
        return "\n".join(lines[-TAIL_LINES:])

    def close(self, timeout_s: float = 30.0) -> None:
        """End the server, within `timeout_s` by force. A second call does nothing."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait(timeout_s)
            shutil.rmtree(self._folder, ignore_errors=True)


def check_names(settings: Mapping[str, Any]) -> None:
    """Raises TypeError for a setting that `serve` does not have, or that is not the caller's choice."""
    names = {field.name for field in dataclasses.fields(ServeSettings)} - set(OWN_SETTINGS)
    for name in settings:
        if name not in names:
            hint = OPTIONS_OF_OTHERS.get(f"--{name.replace('_', '-')}")
            also = f" (as an option, {hint})" if hint else ""
            raise TypeError(f"unknown setting {name!r}{also}; there are {', '.join(sorted(names))}")


def strings(value: Any) -> tuple[str, ...]:
    """One value or several, as text."""
    return tuple(map(str, value)) if isinstance(value, list | tuple) else (str(value),)
