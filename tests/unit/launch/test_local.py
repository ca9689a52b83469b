"""Guards scripts/serve.py: the command lines of the roles, and one whole life with stand-ins for the four programs."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from baton.launch import local
from baton.node.errors import SettingsError

ROOT = Path(__file__).resolve().parents[3]

# The stand-ins drain on SIGTERM, as the real ones do; the proxy has a token as soon as three workers and the store run.
FAKE_PROXY = """
import glob, http.server, signal, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = self.path == "/health_generate" and len(glob.glob("*.up")) == 4
        self.send_response(200 if ready else 503)
        self.end_headers()
    def log_message(self, *args):
        pass
def end(*_):
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
http.server.HTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()
"""
FAKE_WORKER = """
import signal, sys
def end(*_):
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
open(sys.argv[sys.argv.index("--worker-id") + 1] + ".up", "w").close()
signal.pause()
"""
FAKE_STORE = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print("drained", flush=True), sys.exit(0)))
open("store.up", "w").close()
signal.pause()
"""
FAKES = {"proxy": FAKE_PROXY, "kvtransfer": FAKE_STORE}


def options_of(argv: tuple[str, ...]) -> list[str]:
    return list(argv[argv.index("-m") + 1 :])


def test_each_role_gets_the_options_that_it_has() -> None:
    """A worker that is told another proxy, or the same name as its twin, never serves."""
    settings = local.ServeSettings(model="m", port=9, prefill=2, device="cpu", worker_arg=("--num-blocks=5",))
    specs = local.roles(settings, 777, 778, {})
    assert [(spec.name, spec.group) for spec in specs] == [
        ("proxy", "proxy"),
        ("store", "store"),
        ("prefill-0", "prefill"),
        ("prefill-1", "prefill"),
        ("decode-0", "decode"),
    ]
    address = "tcp://127.0.0.1:777"
    model = ["--model", "m", "--served-model-name", "m"]
    assert options_of(specs[0].argv) == (
        ["baton.proxy", *model, "--host", "127.0.0.1", "--port", "9", "--control-address", address]
    )
    store = "tcp://127.0.0.1:778"
    assert options_of(specs[1].argv) == (
        ["baton.kvtransfer", "--store-id", "store", "--proxy", address, "--bind", store, "--ram-gib", "0.25"]
    )
    worker = ["--model", "m", "--proxy", address, "--device", "cpu", "--worker-id", "prefill-1", "--store", store]
    assert options_of(specs[3].argv) == ["baton.prefill", *worker, "--num-blocks=5"]


def test_workers_take_the_gpus_in_turns() -> None:
    """Two workers on one GPU while another idles would halve what the machine gives."""
    specs = local.roles(local.ServeSettings(prefill=2, decode=1, device="cuda", gpus=(0, 3)), 1, 2, {})
    given = {spec.name: spec.argv[spec.argv.index("--gpu") + 1] for spec in specs if "--gpu" in spec.argv}
    assert given == {"prefill-0": "0", "prefill-1": "3", "decode-0": "0"}
    assert {spec.name for spec in specs if "--store" in spec.argv} == set(given), "they share the store"


def test_the_store_is_as_asked_for_and_nobody_needs_it() -> None:
    """A store that cannot be kept alive must not end the serving; without RAM for one, none is started."""
    specs = local.roles(local.ServeSettings(store_disk_gib=2, store_path=Path("d")), 1, 2, {})
    assert options_of(specs[1].argv)[-4:] == ["--disk-gib", "2", "--path", "d"]
    assert [spec.name for spec in specs if not spec.needed] == ["store"]
    specs = local.roles(local.ServeSettings(store_ram_gib=0), 1, 2, {})
    assert "store" not in [spec.name for spec in specs] and "--store" not in specs[1].argv


def test_clients_call_a_model_by_a_name_not_by_a_path(tmp_path: Path) -> None:
    """The path of a folder on the server is nobody's business, and differs between machines."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert local.served_name(local.ServeSettings(model=f"{folder}/")) == "my-model"
    assert local.served_name(local.ServeSettings(model="org/name")) == "org/name"
    assert local.served_name(local.ServeSettings()) == "demo"
    assert local.served_name(local.ServeSettings(served_model_name="x")) == "x"


def test_without_prefill_workers_decode_workers_prefill() -> None:
    """`--prefill 0` would wait for ever for a prefill worker that nobody starts."""
    argv = local.roles(local.ServeSettings(prefill=0), 1, 2, {})[0].argv
    assert argv[argv.index("--local-prefill") + 1] == "always"
    argv = local.roles(local.ServeSettings(prefill=0, local_prefill="short"), 1, 2, {})[0].argv
    assert argv[argv.index("--local-prefill") + 1] == "short"


def test_the_key_is_in_no_command_line_and_only_the_proxy_has_it() -> None:
    """Every user of the machine can read command lines."""
    specs = local.roles(local.ServeSettings(api_key="hunter2"), 1, 2, {})
    assert not any("hunter2" in argument for spec in specs for argument in spec.argv)
    assert [spec.name for spec in specs if "hunter2" in spec.env.values()] == ["proxy"]
    assert "hunter2" not in local.curl_line(local.ServeSettings(api_key="hunter2"), "http://x")


@pytest.mark.parametrize(("cores", "workers", "threads"), [(1, 2, 1), (2, 2, 1), (8, 2, 3), (64, 1, 63), (4, 8, 1)])
def test_threads_of_all_workers_fit_the_cores(cores: int, workers: int, threads: int) -> None:
    """Two workers with a thread a core each run at a fraction of their speed."""
    assert local.threads_a_worker(cores, workers) == threads


def test_a_number_of_threads_that_the_user_set_is_kept() -> None:
    """It was set for a reason."""
    spec = local.roles(local.ServeSettings(), 1, 2, {"OMP_NUM_THREADS": "5"})[-1]
    assert spec.env["OMP_NUM_THREADS"] == "5"


def test_the_curl_line_can_be_pasted() -> None:
    """Quotes in a folder's name must not break out of the command."""
    words = shlex.split(local.curl_line(local.ServeSettings(model='it\'s "m"'), "http://127.0.0.1:8000"))
    assert json.loads(words[words.index("-d") + 1])["model"] == 'it\'s "m"'


def test_a_port_in_use_is_told_at_once() -> None:
    """Else the proxy dies after the weights were loaded, in the middle of the other output."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(SettingsError, match=r"in use.*--port"):
            local.check_port("127.0.0.1", taken.getsockname()[1])
    local.check_port("127.0.0.1", local.free_port())


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
        assert await local.http_status("127.0.0.1", port, "/", 30.0) == status
    assert await local.http_status("127.0.0.1", port, "/", 30.0) == 0


@contextmanager
def serving(folder: Path, port: int, *options: str, **programs: str) -> Iterator[subprocess.Popen[str]]:
    """`scripts/serve.py` with a package `baton` in which the four programs are stand-ins, and the rest is as it is."""
    package = folder / "stand-ins" / "baton"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT)!r})")
    for role in ("proxy", "prefill", "decode", "kvtransfer"):
        (package / f"{role}.py").write_text(programs.get(role, FAKES.get(role, FAKE_WORKER)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), os.environ.get("PYTHONPATH", "")])}
    (folder / "config.json").write_text("{}")
    command = [
        sys.executable,
        *("-P", "-m", "baton.launch.local"),
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
def test_a_whole_life(tmp_path: Path, signum: int) -> None:
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
    local.check_port("127.0.0.1", port)


def test_a_worker_that_cannot_start_ends_the_start_with_its_last_words(tmp_path: Path) -> None:
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
    ],
)
def test_wrong_settings_are_one_line_before_anything_starts(tmp_path: Path, options: list[str], said: str) -> None:
    """A refusal after minutes of loading, or in a traceback, is no use."""
    with serving(tmp_path, local.free_port(), *options) as process:
        lines = lines_until(process, "no such line")
        assert process.wait(60) == 2
    assert len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("role", ["proxy", "prefill", "decode", "store"])
def test_the_roles_have_the_options_that_they_are_given(role: str) -> None:
    """An option renamed in a role would only be found by starting everything; a key not read is no protection."""
    module = importlib.import_module("baton.kvtransfer.store.settings" if role == "store" else f"baton.{role}.settings")
    fields = getattr(module, f"{role.capitalize()}Settings").__dataclass_fields__
    specs = local.roles(
        local.ServeSettings(prefill=1, local_prefill="short", insecure_network=True, store_disk_gib=1), 1, 2, {}
    )
    argv = next(spec.argv for spec in specs if spec.group == role)
    given = {word[2:].replace("-", "_") for word in argv if word.startswith("--")}
    assert given <= set(fields)
    if role == "proxy":
        assert fields["api_key"].metadata["option"].env == "BATON_API_KEY"
