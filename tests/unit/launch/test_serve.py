"""Guards the command `serve`: its probe, its lines, its errors, and one whole life with stand-ins for the programs."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from baton.launch import local, serve
from baton.node.errors import SettingsError
from baton.node.local_http import proxy_socket

ROOT = Path(__file__).resolve().parents[3]

# The stand-ins drain on SIGTERM, as the real ones do; the proxy has a token as soon as three workers and the store run.
FAKE_PROXY = """
import glob, http.server, os, signal, sys
options = dict(word.split("=", 1) for word in sys.argv if "=" in word)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = self.path == "/health_generate" and len(glob.glob("*.up")) == 4
        key = os.environ.get("BATON_API_KEY")
        known = not key or self.headers["Authorization"] == f"Bearer {key}"
        self.send_response(401 if not known else 200 if ready else 503)
        self.end_headers()
    def log_message(self, *args):
        pass
def end(*_):
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Handler).serve_forever()
"""
FAKE_WORKER = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # pause() would miss one that comes just before it
name = sys.argv[sys.argv.index("--worker-id") + 1] if "--worker-id" in sys.argv else "store"
open(name + ".up", "w").close()
signal.sigwait({signal.SIGTERM})
print("drained", flush=True)
"""
FAKE_GROUP_PROXY = """
import http.server, os, signal, socketserver, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists("go") else 503)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGHUP, lambda *_: print("heard SIGHUP", flush=True))
folder = sys.argv[sys.argv.index("--group-folder") + 1]
server = socketserver.UnixStreamServer(os.path.join(folder, "proxy-0.sock"), Handler)
print("listens", flush=True)
server.serve_forever()
"""
FAKES = {"proxy": FAKE_PROXY}


def test_the_curl_line_shows_no_key() -> None:
    """Output ends in logs."""
    assert "hunter2" not in serve.curl_line(local.ServeSettings(api_key=("hunter2",)), "demo", "http://x")


def test_the_curl_line_can_be_pasted() -> None:
    """Quotes in a folder's name must not break out of the command."""
    words = shlex.split(serve.curl_line(local.ServeSettings(), 'it\'s "m"', "http://127.0.0.1:8000"))
    assert json.loads(words[words.index("-d") + 1])["model"] == 'it\'s "m"'


def test_a_port_in_use_is_an_error_at_once() -> None:
    """Else the proxy dies after the weights were loaded, in the middle of the other output."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match=r"in use.*--port"):
            serve.check_port("127.0.0.1", taken.getsockname()[1])
    serve.check_port("127.0.0.1", local.free_port())


@pytest.mark.parametrize(
    ("answer", "status"),
    [(b"HTTP/1.1 200 OK\r\n\r\n", 200), (b"HTTP/1.1 503 Busy\r\n\r\n", 503), (b"", 0), (b"\xff\n", 0), (b"a b c\n", 0)],
)
async def test_the_probe_reads_any_answer(answer: bytes, status: int) -> None:
    """A half-started server's nonsense must count as "not yet", not end the start."""

    async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve_once, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        assert await serve.http_status("127.0.0.1", port, "/", 30.0) == status
    assert await serve.http_status("127.0.0.1", port, "/", 30.0) == 0


async def test_the_probe_names_a_key_that_it_does_not_have() -> None:
    """A start that waits for a token, with workers that serve, must not look like a slow load."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 401 Unauthorized\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        assert "--api-key" in await serve.token_probe("127.0.0.1", server.sockets[0].getsockname()[1], "")()


async def test_each_of_several_proxies_is_asked_until_it_has_a_token() -> None:
    """Guards `ready` against a proxy behind the port that serves nothing yet, and the others against useless probes."""
    statuses, asked = [b"200", b"503"], [0, 0]

    def server(index: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            asked[index] += 1
            writer.write(b"HTTP/1.1 " + statuses[index] + b" X\r\ncontent-length: 0\r\n\r\n")
            writer.close()

        return serve_once

    with TemporaryDirectory() as path:
        folder = Path(path)
        probe = serve.group_probe(folder, 2)
        assert await probe() == "no token yet from proxy-0"
        async with (
            await asyncio.start_unix_server(server(0), proxy_socket(folder, 0)),
            await asyncio.start_unix_server(server(1), proxy_socket(folder, 1)),
        ):
            assert await probe() == "no token yet from proxy-1 (HTTP 503)"
            statuses[1] = b"200"
            assert await probe() == ""
    assert asked == [1, 2]


@contextmanager
def serving(
    folder: Path, port: int, *options: str, files: dict[str, str] | None = None, **programs: str
) -> Iterator[subprocess.Popen[str]]:
    """`serve` with a package `baton` in which the four programs are stand-ins, and the rest is as it is."""
    package = folder / "stand-ins" / "baton"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT)!r})")
    for role in ("proxy", "prefill", "decode", "kvtransfer"):
        (package / role).mkdir()
        (package / role / "__init__.py").write_text(f"__path__.append({str(ROOT / role)!r})")
        (package / role / "__main__.py").write_text(programs.get(role, FAKES.get(role, FAKE_WORKER)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])}
    shutil.copytree(ROOT / "models" / "demo", folder, dirs_exist_ok=True)
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    command = [
        sys.executable,
        *("-P", "-m", "baton.launch.serve"),
        "--model",
        str(folder),
        "--port",
        str(port),
        *options,
    ]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def lines_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """The output up to the line that has `text`; the whole where it never comes."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line.rstrip("\n"))
        if text in line:
            break
    return lines


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_start_serve_restart_and_drain(tmp_path: Path, signum: int) -> None:
    """From the first process to `ready`, the command to paste, a restart, and a drain on Ctrl-C or SIGTERM."""
    port = local.free_port()
    with serving(tmp_path, port, "--prefill", "2") as process:
        assert process.stdout is not None
        lines = lines_until(process, "ready ")
        assert lines[-1] == f"ready http://127.0.0.1:{port}", lines
        assert process.stdout.readline().startswith(f"curl http://127.0.0.1:{port}/v1/completions ")
        process.send_signal(signum)
        rest = process.stdout.read().splitlines()
        assert process.wait(60) == 0
    assert rest[0].startswith("stopping")
    assert sorted(rest[1:-1]) == [
        f"[{name}] drained" for name in ("decode-0", "prefill-0", "prefill-1", "proxy", "store")
    ]
    assert rest[-1] == "stopped"
    serve.check_port("127.0.0.1", port)


def test_the_probe_sends_the_api_key(tmp_path: Path) -> None:
    """`serve --api-key X` never became ready: its own probe got a 401. The key is in no other command line."""
    port = local.free_port()
    with serving(tmp_path, port, "--prefill", "2", "--api-key", "hunter2") as process:
        lines = lines_until(process, "ready ")
        assert lines and lines[-1] == f"ready http://127.0.0.1:{port}", lines
        commands = [command_line(pid) for pid in children(process.pid)]
        assert len(commands) == 5 and not [command for command in commands if b"hunter2" in command]


def test_sighup_reads_the_tenants_again(tmp_path: Path) -> None:
    """Guards `kill -HUP` of a server with tenants: it ended the server, or a proxy that was still starting."""
    file = tmp_path / "tenants.toml"
    file.write_text(f'[a]\nkeys_sha256 = ["{"0" * 64}"]\n')
    with serving(tmp_path, local.free_port(), "--tenants", str(file), proxy=FAKE_GROUP_PROXY) as process:
        lines_until(process, "[proxy] listens")
        process.send_signal(signal.SIGHUP)
        assert lines_until(process, "SIGHUP")[-1] == "SIGHUP comes too early: the proxy is starting"
        (tmp_path / "go").touch()
        assert lines_until(process, "ready ")[-1].startswith("ready ")
        process.send_signal(signal.SIGHUP)
        lines = lines_until(process, "heard SIGHUP")
        assert "reading --tenants again" in lines and lines[-1] == "[proxy] heard SIGHUP"
        process.send_signal(signal.SIGTERM)
        assert lines_until(process, "no such line")[-1] == "stopped"
        assert process.wait(60) == 0


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_worker_that_cannot_start_ends_serve_with_its_error(tmp_path: Path) -> None:
    """The user must see the worker's reason last, and get the shell back."""
    with serving(tmp_path, local.free_port(), decode="import sys; sys.exit('the pool does not fit')") as process:
        lines = lines_until(process, "no such line")
        assert process.wait(60) == 1
    assert "    the pool does not fit" in lines
    assert not any(line.startswith("ready") for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--host", "0.0.0.0"], "--insecure-network"),
        (["--model", "no-such-folder"], "no-such-folder"),
        (["--host", "256.1.1.1", "--insecure-network"], "cannot listen on 256.1.1.1"),
        (["--prefill", "-1"], "at least 0"),
        (["--worker-arg=--max-model-len=99999"], "positions end at 2048"),
        (["--decode-arg=--max-model-len", "--decode-arg=99999"], "positions end at 2048"),
        (["--chat-template", "no-such-file"], "no-such-file cannot be read"),
        (["--tls-cert", "no-such-file"], "no-such-file: cannot be read"),
        (["--api-key-file", "no-such-file"], "no-such-file: cannot be read"),
        (["--tenants", "no-such-file"], "no-such-file: cannot be read"),
        (["--tenants", "file", "--api-key", "k"], "--tenants holds all keys"),
    ],
)
def test_wrong_settings_are_one_line_before_anything_starts(tmp_path: Path, options: list[str], said: str) -> None:
    """A refusal after minutes of loading, or in a traceback, is no use."""
    with serving(tmp_path, local.free_port(), *options) as process:
        lines = lines_until(process, "no such line")
        assert process.wait(60) == 2
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"config.json": '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}'},
            "GPT2LMHeadModel is not supported",
        ),
        ({"config.json": "{"}, "not valid JSON"),
        ({"model.safetensors": "cut off"}, "model.safetensors: not a whole safetensors file"),
        ({"tokenizer.json": "{}"}, "tokenizer"),
        ({"tokenizer_config.json": '{"chat_template": "{% if %}"}'}, "template"),
    ],
    ids=["architecture", "config", "weights", "tokenizer", "template"],
)
def test_a_broken_folder_is_one_line_before_anything_starts(tmp_path: Path, files: dict[str, str], said: str) -> None:
    """A worker's refusal came after seconds, between the lines of the other processes."""
    with serving(tmp_path, local.free_port(), files=files) as process:
        lines = lines_until(process, "no such line")
        assert process.wait(60) == 2
    assert len(lines) == 1 and said in lines[0], lines
    assert not list(tmp_path.glob("*.up"))
