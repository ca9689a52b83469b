"""What a model's folder says of pooling, which alone decides whether its vectors mean anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.proxy.text.pooling import pooling_of

TRANSFORMER = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
POOLING = {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}


@pytest.mark.parametrize(
    ("modules", "config", "rule"),
    [
        (None, None, ""),
        ([TRANSFORMER], None, ""),
        ([TRANSFORMER, POOLING], None, ""),
        ([TRANSFORMER, POOLING], {"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last token"),
        ([TRANSFORMER, POOLING], {"pooling_mode_mean_tokens": True}, "mean"),
        ([TRANSFORMER, POOLING], {"pooling_mode_cls_token": True}, "other"),
        ({"a": 1}, {}, ""),
        ([5, POOLING], {"pooling_mode_mean_tokens": True}, "mean"),
        ("text", None, ""),
    ],
)
def test_rules(tmp_path: Path, modules: Any, config: Any, rule: str) -> None:
    """Guards against a rule that no file says, and against a folder that cannot generate because of such a file."""
    if modules is not None:
        (tmp_path / "modules.json").write_text(modules if isinstance(modules, str) else json.dumps(modules))
    if config is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config))
    assert pooling_of(tmp_path) == rule
