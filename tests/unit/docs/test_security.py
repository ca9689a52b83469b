"""SECURITY.md names tests as its proof: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "SECURITY.md").read_text()
FILES = sorted(
    path
    for folder in ("unit", "integration", "simulation", "fuzz", "gpu", "clients")
    for path in (ROOT / "tests" / folder).rglob("test_*.py")
    if not {".venv", "node_modules"} & set(path.parts)
)
"""Our own: the environment of the clients lies in tests/clients."""


def test_every_test_that_is_named_exists() -> None:
    """Guards a claim against the test that was renamed or removed."""
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    found = {name for path in FILES for name in re.findall(r"^\s*(?:async )?def (test_\w+)", path.read_text(), re.M)}
    assert len(named) > 40
    assert named - found == set()


def test_every_file_that_is_named_exists() -> None:
    """Guards against a path that moved."""
    named = set(re.findall(r"`([\w/]+\.py)`", PAGE)) | set(re.findall(r"\]\(([\w/.]+)\)", PAGE))
    assert named
    assert [path for path in sorted(named) if not (ROOT / path).exists() and not (ROOT / "tests" / path).exists()] == []


def test_no_advisory_is_misspelt() -> None:
    """Guards identifiers, which readers search for."""
    for written in re.findall(r"(?:CVE|GHSA)-[\w-]+", PAGE):
        assert re.fullmatch(r"CVE-20\d\d-\d{4,6}|GHSA(-[a-z0-9]{4}){3}", written), written
