"""Guards the check of a model folder before anything starts, and what it says about weights in other formats."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from baton.models.check import check, main
from baton.models.config import ModelConfig
from baton.node.errors import SettingsError
from baton.tests.unit.models.eagle_folders import random_draft

DEMO = Path(__file__).resolve().parents[3] / "models" / "demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO, tmp_path / "model"))


def test_a_good_folder_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a model that is refused though its workers could serve it."""
    assert main([str(folder), "", "", "", "", "", ""]) == 0
    assert main([str(folder), "auto", "2048", "fp8", "2", "ngram", "3"]) == 0
    assert capsys.readouterr().err == ""
    (folder / "model.safetensors").unlink()
    check(folder, "dummy", None)


def test_a_context_that_the_model_does_not_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against an error only after the weights were read."""
    assert main([str(folder), "", "2049", "", "1", "", "1"]) == 2
    assert capsys.readouterr().err == "--max-model-len 2049: the model's positions end at 2048\n"


def test_ranks_and_stages_that_cannot_share_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against workers that start, and then cannot cut the weights."""
    for num_ranks, num_stages in (("3", "1"), ("8", "1"), ("1", "9")):
        assert main([str(folder), "", "", "", num_ranks, "", num_stages]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "--tp 3: must be one of 1, 2, 4, 8",
        "4 query heads cannot be shared out to 8 ranks",
        "--pp 9: must be from 1 to 8",
    ]


def test_a_draft_of_another_model(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against a draft of another model that is refused only when the weights were read."""
    model = ModelConfig.from_folder(folder)
    for name, heads in (("draft", 2), ("other", 4)):
        random_draft(tmp_path / name, model, num_key_value_heads=heads)
    assert main([str(folder), "", "", "", "", f"eagle:{tmp_path / 'draft'}", ""]) == 0
    assert main([str(folder), "", "", "", "", f"eagle:{tmp_path / 'other'}", ""]) == 2
    assert "num_key_value_heads of the draft is 4, and of the model 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pytorch_model.bin", "pytorch_model.bin is a pickle, which can run code, and is never read. Convert"),
        ("consolidated.00.pth", "consolidated.00.pth is a pickle"),
        ("model-Q4_K_M.gguf", "GGUF files are not read"),
        (None, "weights are read from safetensors files only"),
    ],
)
def test_weights_in_another_format_say_what_to_do(folder: Path, name: str | None, said: str) -> None:
    """Guards against "model.safetensors is not there" in a folder that plainly has weights."""
    (folder / "model.safetensors").unlink()
    if name:
        (folder / name).write_bytes(b"\0")
    with pytest.raises(SettingsError, match=r"neither model\.safetensors nor") as raised:
        check(folder, "auto", None)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_quantised_weights_that_nothing_here_reads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against workers that start, and then cannot serve."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    assert main([str(folder), "", "", "", "", "", ""]) == 2
    assert "quant_method 'bitsandbytes' are not supported; supported: fp8, " in capsys.readouterr().err
