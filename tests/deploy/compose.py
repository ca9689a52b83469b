"""The files of Docker and Compose as values: what they say, with their variables' defaults. It runs nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy"
FILES = ("compose.yaml", "compose.gpu.yaml")
_VARIABLE = re.compile(r"\$\{\w+:?-([^}]*)\}")
_INSTRUCTION = re.compile(r"^([A-Z]+) (.*)$", re.M)


def services(file: str) -> dict[str, dict[str, Any]]:
    """The services of a file by name, variables replaced by their defaults."""
    text = _VARIABLE.sub(lambda found: found[1], (FOLDER / file).read_text())
    return dict(yaml.safe_load(text)["services"])


def nodes(file: str) -> dict[str, dict[str, Any]]:
    """Those that run a node of Baton."""
    return {name: each for name, each in services(file).items() if "command" in each and name != "prometheus"}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), lines joined and comments left out."""
    text = re.sub(r"^#.*\n", "", (FOLDER / "Dockerfile").read_text(), flags=re.M).replace("\\\n", "")
    return _INSTRUCTION.findall(text)
