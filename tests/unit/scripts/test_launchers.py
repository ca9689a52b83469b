"""Guards the launchers, and the commands that the documentation names: a reader copies them."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest

from baton.benchmark.__main__ import BENCHMARKS

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = sorted(path for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix)
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=lambda path: path.name)
def test_a_launcher_is_a_script_of_a_module_that_exists(launcher: Path) -> None:
    """A module that was moved is missed only when a user starts it."""
    text = launcher.read_text(encoding="utf-8")
    assert os.access(launcher, os.X_OK) and text.startswith("#!/usr/bin/env bash\n# ")
    subprocess.run(["bash", "-n", str(launcher)], check=True)
    modules = re.findall(r"-m (baton[\w.]*)", text)
    assert [module for module in modules if not importlib.util.find_spec(module)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_names_commands_that_exist(page: Path) -> None:
    """A command of an older version ends a reader's trust in the figures beside it."""
    text = page.read_text(encoding="utf-8")
    scripts = {name for name in re.findall(r"(?<![\w/:])scripts/([a-z]\w*)(?![\w.])", text)}
    assert scripts - {launcher.name for launcher in LAUNCHERS} == set()
    benchmarks = set(re.findall(r"(?:scripts|baton)[/ ]bench ([a-z][a-z0-9-]*)", text))
    assert benchmarks - set(BENCHMARKS) == set()
