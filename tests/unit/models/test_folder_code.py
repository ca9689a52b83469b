"""A model folder that brings programs: all that is read from it is data, and nothing that it names is imported."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from baton.models.check import check
from baton.models.checkpoint import Checkpoint
from baton.models.config import ModelConfig
from baton.node.errors import SettingsError
from baton.proxy.text.model_text import ModelText

DEMO = Path(__file__).parents[3] / "models" / "demo"
AUTO_MAP = {name: f"evil_{name}.Evil" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The demo model with a program behind every name that a library of Hugging Face might follow."""
    made = tmp_path / "model"
    shutil.copytree(DEMO, made)
    mark = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in AUTO_MAP:
        (made / f"evil_{name}.py").write_text(f"{mark}class Evil: pass\n")
    (made / "custom_generate").mkdir()
    for name in ("generate.py", "__init__.py"):
        (made / "custom_generate" / name).write_text(mark)
    for name in ("setup.py", "sitecustomize.py", "conftest.py", "modeling.py", "configuration.py"):
        (made / name).write_text(mark)

    def add(values: dict[str, Any]) -> None:
        nested = {"auto_map": AUTO_MAP, "model_type": "evil_AutoConfig"}
        values |= {"auto_map": AUTO_MAP, "trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}
        values |= {name: nested for name in ("text_config", "vision_config", "draft_config", "assistant_config")}

    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        edit(made / name, add)
    return made


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    values = json.loads(path.read_text()) if path.exists() else {}
    change(values)
    path.write_text(json.dumps(values))


def test_no_program_of_a_folder_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CVE-2025-66448, CVE-2026-22807 and CVE-2026-27893: `auto_map` was followed though its user had not allowed it."""
    monkeypatch.chdir(folder)
    try:
        check(folder, "auto", None)
        ModelConfig.from_folder(folder)
        Checkpoint.open(folder)
        ModelText(folder).close()
    except SettingsError as error:
        pytest.fail(f"the folder is refused for another reason: {error}")
    assert not (folder.parent / "ran").exists()
    assert not [name for name in sys.modules if name.startswith(("evil_", "custom_generate"))]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "consolidated.00.pth"])
def test_no_pickle_of_a_folder_is_read(folder: Path, name: str) -> None:
    """CVE-2025-24357: weights were unpickled, which runs what their author wants."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / name).write_bytes(f"cos\nsystem\n(S'touch {folder.parent / 'ran'}'\ntR.".encode())
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SettingsError):
        Checkpoint.open(folder)
    assert not (folder.parent / "ran").exists()
