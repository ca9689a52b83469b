"""How a model's folder says that a text becomes one vector: the last token's, the mean of all, or another rule.

Only what a folder says counts: pooled otherwise, a model's vectors mean nothing. Knows no requests.
Source: sentence-transformers, `modules.json` and the `config.json` of its module `Pooling`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from baton.node.errors import SettingsError
from baton.node.model_folder import MAX_CONFIG_BYTES, read_file, read_object

MODULES = "modules.json"
_MODES = {"pooling_mode_lasttoken": "last token", "pooling_mode_mean_tokens": "mean"}
"""Rules that fit models of this server; of the others only that there is one is said."""


def pooling_of(folder: Path) -> str:
    """Its name; empty where the folder names none, or has files that cannot be read: it may still generate."""
    try:
        modules = _modules(folder / MODULES)
        found = next((each for each in modules if str(each.get("type", "")).endswith("Pooling")), None)
        if found is None:
            return ""
        config = read_object(folder / str(found.get("path", "")) / "config.json", MAX_CONFIG_BYTES)
    except (OSError, ValueError, RecursionError, SettingsError):
        return ""
    return next((name for mode, name in _MODES.items() if config.get(mode) is True), "other")


def _modules(path: Path) -> list[dict[str, Any]]:
    found = json.loads(read_file(path, MAX_CONFIG_BYTES))
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
