"""Guards node.modelhub: a name leads to a folder with a model in it, or to one clear error; never to a pickle."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from baton.node.errors import SettingsError
from baton.node.modelhub import FETCHED, locate_model


def test_demo_is_the_packaged_model() -> None:
    """`scripts/serve` without options would have nothing to serve."""
    folder = locate_model("demo")
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def test_an_existing_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    """A local model must never be looked up, or downloaded, elsewhere."""
    (tmp_path / "config.json").write_text("{}")
    assert locate_model(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["missing", "./org/name", "/no/such/folder", "a/b/c", "org/", "", "org/../x", "-x/y"])
def test_what_is_no_folder_and_no_hub_id_is_told_so(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistyped folder must not turn into a download, nor the current folder into a model."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="model"):
        locate_model(name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """The error should name the folder, not a missing key deep in a loader."""
    with pytest.raises(SettingsError, match=r"config\.json"):
        locate_model(str(tmp_path))


def test_a_file_is_refused(tmp_path: Path) -> None:
    """--model model.safetensors is a mistake that people make."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SettingsError, match="is a file"):
        locate_model(str(file))


def test_an_unreachable_hub_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without network the library raises a page of causes."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"'some-org/some-model': .*cannot be reached") as caught:
        locate_model("some-org/some-model")
    assert "\n" not in str(caught.value)


def test_a_model_in_the_hubs_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start of a downloaded model must work offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    snapshot = tmp_path / "models--some-org--some-model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--some-org--some-model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    monkeypatch.chdir(tmp_path)
    assert locate_model("some-org/some-model").samefile(snapshot)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.py", "model.ckpt"])
def test_no_file_that_can_hold_code_is_fetched(name: str) -> None:
    """Pickles and scripts run code when they are loaded."""
    assert not any(fnmatch(name, pattern) for pattern in FETCHED)
