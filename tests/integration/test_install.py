"""Installations: a wheel in a fresh environment, a read-only checkout in a path with spaces, a hostile folder."""

from __future__ import annotations

import os
import shutil
import signal
import site
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest

from baton.launch.local import free_port
from baton.tests.integration.cluster import ROOT
from baton.tests.unit.test_tree import tracked

LAUNCHERS = ("serve", "proxy", "prefill", "decode", "kvstore", "simulate", "bench", "bench_serving")
HOSTILE = (
    *("worker.py", "models.py", "baton.py", "torch.py", "json.py", "asyncio.py", "zmq.py", "sitecustomize.py"),
    *("node/__init__.py", "proxy/__init__.py", "kernels/__init__.py", "launch/__init__.py"),
)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository's files, under a path with spaces."""
    folder = tmp_path_factory.mktemp("a folder with spaces") / "baton clone"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without this checkout on its path; `python3` is the one that runs the tests."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "BATON_API_KEY")}
    path = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    return {**environ, "PATH": path, "OMP_NUM_THREADS": "1", **more}


@contextmanager
def serving(command: Sequence[str | Path], folder: Path, environ: dict[str, str]) -> Iterator[str]:
    """The URL of a started `serve`, which must exit on SIGINT afterwards."""
    port = free_port()
    with subprocess.Popen(
        [*command, "--port", str(port), "--device", "cpu", "--store-ram-gib", "0.05"],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            lines: list[str] = []
            for line in process.stdout:
                lines.append(line)
                if line.startswith("ready "):
                    break
            assert lines and lines[-1].startswith("ready "), "".join(lines)
            yield lines[-1].split()[1]
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
            assert process.wait(60) == 0, rest
        finally:
            process.kill()


def complete(url: str) -> str:
    body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy because setuptools leaves folders in the source tree."""
    source, out = tmp_path_factory.mktemp("source") / "baton", tmp_path_factory.mktemp("wheel")
    shutil.copytree(checkout, source)
    options = ("-q", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out))
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_a_wheel_holds_baton_and_nothing_else(wheel: Path) -> None:
    """Guards against top-level folders such as `models` in site-packages, which collide with others, and against
    packages or data files that pyproject.toml does not list."""
    names = set(ZipFile(wheel).namelist())
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"baton"}
    apart = ("tests/", "scripts/", "docs/", "deploy/", ".")
    files = {name for name in tracked() if "/" in name and not name.startswith(apart)}
    files |= {name for name in tracked() if "/" not in name and name.endswith(".py")}
    assert {f"baton/{name}" for name in files if not name.endswith(".md")} - names == set()
    assert [
        name for name in names if name.startswith(("baton/tests", "baton/scripts", "baton/docs", "baton/deploy"))
    ] == []


def test_an_installed_baton_serves_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """Guards `pipx install`: no code may need the repository around the package."""
    home, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    install = ("--python", str(python), "install", "-q", "--no-deps", "--no-index", str(wheel))
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, cwd=empty, env=clean_environment())
    (packages,) = home.glob("lib/python*/site-packages")
    # The dependencies come from the tests' environment; its .pth files are not processed.
    (packages / "dependencies.pth").write_text("\n".join([*site.getsitepackages(), ""]))
    environ = clean_environment(VIRTUAL_ENV=str(home))
    where = subprocess.run(
        [python, "-P", "-c", "import baton; print(baton.__file__)"],
        cwd=empty,
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    )
    assert Path(where.stdout.strip()).is_relative_to(packages)
    with serving([home / "bin" / "baton", "serve", "demo"], empty, environ) as url:
        assert complete(url)
    assert list(empty.iterdir()) == []


def test_every_launcher_works_from_a_read_only_checkout(checkout: Path, tmp_path: Path) -> None:
    """Guards paths with spaces, which shell scripts may split, and checkouts without write permission."""
    for path in [checkout, *checkout.rglob("*")]:
        path.chmod(path.stat().st_mode & ~0o222)
    try:
        # Root ignores permissions, so a file takes the name of the folder that must not be created.
        checkout.chmod(0o755)
        (checkout / ".link").touch()
        checkout.chmod(0o555)
        before = sorted(path for path in checkout.rglob("*") if "__pycache__" not in path.parts)
        environ = clean_environment(XDG_CACHE_HOME=str(tmp_path / "the cache"))
        for name in LAUNCHERS:
            command = [checkout / "scripts" / name, "--no-install", "--help"]
            done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
            assert done.returncode == 0 and "usage: baton " in done.stdout, (name, done.stdout, done.stderr)
        with serving([checkout / "scripts" / "serve", "--no-install", "--prefill", "0"], tmp_path, environ) as url:
            assert complete(url)
        assert sorted(path for path in checkout.rglob("*") if "__pycache__" not in path.parts) == before
    finally:
        for path in [checkout, *checkout.rglob("*")]:
            path.chmod(path.stat().st_mode | 0o200)


def test_files_of_the_current_folder_are_not_executed(tmp_path: Path) -> None:
    """Guards against running code from the current folder, such as files downloaded beside a model."""
    mark = tmp_path / "executed"
    folder = tmp_path / "hostile"
    for name in HOSTILE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"open({str(mark)!r}, 'a').write(__file__ + '\\n')\n")
    environ = clean_environment()
    with serving([ROOT / "scripts" / "serve", "--no-install"], folder, environ) as url:
        assert complete(url)
    environ["PYTHONPATH"] = os.environ["PYTHONPATH"] if "PYTHONPATH" in os.environ else str(ROOT / ".link")
    help_of_proxy = [sys.executable, "-P", "-m", "baton.proxy", "--help"]
    subprocess.run(help_of_proxy, cwd=folder, env=environ, check=True, capture_output=True)
    assert not mark.exists(), mark.read_text()
