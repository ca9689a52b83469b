"""README's table of clients names what tests/clients installs, in the versions of its lock files."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CLIENTS = ROOT / "tests" / "clients"
ROW = re.compile(r"^\| (?P<names>`.+`) \((?P<language>Python|JavaScript)\) \| (?P<versions>[\d., ]+) \|", re.M)
NOT_CLIENTS = {"jsonschema", "zod"}
"""Libraries with which the scripts check what clients got."""


def written() -> dict[tuple[str, str], str]:
    """Versions in README by language and package."""
    found = {}
    for row in ROW.finditer((ROOT / "README.md").read_text()):
        names = re.findall(r"`([^`]+)`", row["names"])
        for name, version in zip(names, row["versions"].split(", "), strict=True):
            found[row["language"], name] = version
    return found


def locked() -> dict[tuple[str, str], str]:
    """The same from the lists of what is installed and their lock files."""
    lines = (CLIENTS / "requirements.in").read_text().splitlines()
    asked = {re.split(r"[\[>=]", line)[0] for line in lines if not line.startswith("#")}
    pins = dict(re.findall(r"^([\w-]+)==(\S+)", (CLIENTS / "requirements.txt").read_text(), re.M))
    python = {("Python", name): pins[name.replace("_", "-")] for name in asked - NOT_CLIENTS}
    packages = json.loads((CLIENTS / "package-lock.json").read_text())["packages"]
    names = packages[""]["dependencies"].keys() - NOT_CLIENTS
    return python | {("JavaScript", name): packages[f"node_modules/{name}"]["version"] for name in names}


def test_every_client_is_in_the_table_in_its_locked_version() -> None:
    """Guards the table against a lock that was renewed, and against a client that came or went."""
    assert written() == locked()
