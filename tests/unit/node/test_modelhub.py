"""Guards node.modelhub: a name resolves to a model folder or one clear error; pickles are never downloaded."""

from __future__ import annotations

import threading
from fnmatch import fnmatch
from pathlib import Path

import pytest

from baton.node.errors import SettingsError
from baton.node.modelhub import FETCHED, locate_model


def test_demo_is_the_packaged_model() -> None:
    """Guards `baton serve` without options, which serves the packaged model."""
    folder = locate_model("demo")
    assert (folder / "config.json").is_file() and (folder / "model.safetensors").is_file()


def test_an_existing_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    """Guards against looking up or downloading a model that is a local folder."""
    (tmp_path / "config.json").write_text("{}")
    assert locate_model(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("name", ["missing", "./org/name", "/no/such/folder", "a/b/c", "org/", "", "org/../x", "-x/y"])
def test_an_invalid_model_name_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a download for a mistyped folder, and against serving the current folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="model"):
        locate_model(name)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    """Guards the error message: it names the folder, not a key missing deep in a loader."""
    with pytest.raises(SettingsError, match=r"config\.json"):
        locate_model(str(tmp_path))


def test_a_file_is_refused(tmp_path: Path) -> None:
    """Guards against the common mistake `--model model.safetensors`."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SettingsError, match="is a file"):
        locate_model(str(file))


@pytest.mark.parametrize("is_folder", [False, True])
def test_a_gguf_file_says_what_to_do(tmp_path: Path, is_folder: bool) -> None:
    """Guards against a user who looks for a config.json that no GGUF file has."""
    file = tmp_path / "model-Q4_K_M.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(SettingsError, match=r"GGUF files are not read.*save_pretrained"):
        locate_model(str(tmp_path if is_folder else file))


def test_an_unreachable_hub_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against the library's page of chained exceptions when there is no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"'some-org/some-model': .*cannot be reached") as caught:
        locate_model("some-org/some-model")
    assert "\n" not in str(caught.value)


def test_a_download_is_lines_where_there_is_no_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against minutes without a line, and against a log full of a progress bar's carriage returns."""
    hub = pytest.importorskip("huggingface_hub")
    blobs = tmp_path / "models--some-org--some-model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "a.incomplete").write_bytes(bytes(3 << 20))
    (tmp_path / "config.json").write_text("{}")
    reported, lines = threading.Event(), []

    def report(line: str) -> None:
        lines.append(line)
        if len(lines) == 2:
            reported.set()

    def download(hub_id: str, **_: object) -> str:
        assert hub.utils.are_progress_bars_disabled() and reported.wait(60)
        return str(tmp_path)

    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.setattr("baton.node.modelhub.LINE_EVERY_S", 0.001)
    monkeypatch.chdir(tmp_path)
    assert locate_model("some-org/some-model", report).samefile(tmp_path)
    assert lines[0].startswith("downloading some-org/some-model: 3 MiB (")
    assert not hub.utils.are_progress_bars_disabled()


@pytest.mark.parametrize("weights", [False, True])
def test_weights_are_fetched_where_they_are_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool
) -> None:
    """Guards against a proxy on a host of its own that downloads gigabytes to read a tokenizer."""
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text("{}")
    asked: list[str] = []

    def download(hub_id: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    assert locate_model("some-org/some-model", weights=weights).samefile(tmp_path)
    assert any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in asked) == weights
    assert all(any(fnmatch(name, each) for each in asked) for name in ("tokenizer.json", "chat_template.jinja"))


def test_a_model_in_the_hubs_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards offline use: a downloaded model starts without network."""
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
    """Guards against pickles and scripts, which run code when they are loaded."""
    assert not any(fnmatch(name, pattern) for pattern in FETCHED)
