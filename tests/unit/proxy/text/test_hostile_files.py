"""The files that the proxy reads of a model folder, hostile: refused in one sentence before any text, or harmless.

The workers' half is in tests/unit/models/test_hostile_folders.py.
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from baton.node.errors import BadRequest, SettingsError
from baton.node.modelhub import locate_model
from baton.proxy.text.growth import MAX_GROWTH
from baton.proxy.text.model_files import read_model_files
from baton.proxy.text.model_text import ModelText

DEMO = locate_model("demo")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path in DEMO.iterdir():
        if path.suffix == ".json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def edit(folder: Path, name: str = "tokenizer.json", **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_bytes()) | changes))


def refusal(folder: Path) -> str:
    with pytest.raises(SettingsError) as raised:
        ModelText(folder).close()
    text = str(raised.value)
    assert text.isprintable() and len(text) < 700
    return text


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "1 GiB": make_sparse,
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": lambda path: path.mkdir(),
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "list": lambda path: path.write_bytes(b"[]"),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
}


@pytest.mark.parametrize("make", ODD_FILES.values(), ids=ODD_FILES)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_what_is_no_file_of_a_bounded_size_is_not_read(folder: Path, name: str, make: Callable[[Path], object]) -> None:
    """Guards against a proxy that hangs on a pipe at start, or reads a device until memory ends."""
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert name in refusal(folder)


REPLACE = {"type": "Replace", "pattern": {"String": "l"}, "content": "l" * 100_000}
INSERT = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"}
CHARSMAP = base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"x" * 1000 + b"\0").decode()
GROWING: dict[str, dict[str, Any]] = {
    "one rule": {"normalizer": REPLACE},
    "nested": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Sequence", "normalizers": [REPLACE] * 2}]}},
    "many small rules": {"normalizer": {"type": "Sequence", "normalizers": [INSERT] * 30}},
    "prepend": {"normalizer": {"type": "Prepend", "prepend": "x" * 100_000}},
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
    "decoder": {"decoder": {"type": "Sequence", "decoders": [REPLACE, {"type": "Fuse"}]}},
}


@pytest.mark.parametrize("changes", GROWING.values(), ids=GROWING)
def test_rules_that_make_gigabytes_of_a_word_are_refused(folder: Path, changes: dict[str, Any]) -> None:
    """Guards against a proxy that is killed for memory by its first short prompt."""
    edit(folder, **changes)
    assert f"{MAX_GROWTH} times" in refusal(folder)


def test_a_token_of_a_megabyte_is_refused(folder: Path) -> None:
    """Guards against an answer of a few tokens that fills memory."""
    edit(folder, "tokenizer_config.json", extra_special_tokens=["x" * (1 << 20)])
    edit(folder, added_tokens=[{"id": 4096, "content": "y" * (1 << 20), "special": False}])
    assert "token" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("config.json", {"vocab_size": 10**12}),
        ("generation_config.json", {"eos_token_id": list(range(1000))}),
    ],
)
def test_sizes_that_no_model_has_are_refused(folder: Path, name: str, changes: dict[str, Any]) -> None:
    """Guards against requests that no message can carry."""
    (folder / name).write_text(json.dumps(changes))
    assert "more than" in refusal(folder)


@pytest.mark.parametrize("value", [10**400, -1, float("nan"), True, "x", [], {}, None, 1.5, [2**70, -1, "x"]])
def test_odd_values_of_generation_config_count_as_absent(folder: Path, value: Any) -> None:
    """Guards against a default that is out of the range that a message allows."""
    changes = dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "eos_token_id"), value)
    (folder / "generation_config.json").write_text(json.dumps(changes))
    files = read_model_files(folder)
    assert 0 <= files.defaults.temperature <= 100 and 0 < files.defaults.top_p <= 1 and files.defaults.top_k >= 0
    text = ModelText(folder)
    assert all(0 <= token_id < text.vocab_size for token_id in text.eos_ids)
    text.close()


def test_a_pattern_without_an_end_fails_one_request(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Guards against an exception that is no Exception, which would pass all handlers of a request."""
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    edit(folder, pre_tokenizer=pattern)
    text = ModelText(folder)
    with pytest.raises(BadRequest, match="cannot process this text"):
        text.encode("a" * 60 + "!", add_special_tokens=True)
    assert text.encode("a", add_special_tokens=False)
    text.close()
    assert "panicked" in capfd.readouterr().err


def test_mutated_tokenizers_are_read_or_refused(folder: Path) -> None:
    """Guards against an exception of the library that is no Exception, and against one of our own reading."""
    small = Tokenizer.from_file(str(DEMO / "tokenizer.json")).to_str()
    known = json.loads(small)
    known["model"]["vocab"] = dict(list(known["model"]["vocab"].items())[:300])
    known["model"]["merges"] = known["model"]["merges"][:2]
    source = json.dumps(known).encode()
    chance = random.Random(1)
    refused = 0
    for _ in range(300):
        mutated = bytearray(source)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(mutated))
            mutated[at : at + chance.randrange(3)] = chance.choice(
                [b"", b"0", b'"', b"-", b"[", b"}", b"9999999999", b"null"]
            )
        (folder / "tokenizer.json").write_bytes(mutated)
        try:
            read_model_files(folder).tokenizer.encode("Hello")
        except SettingsError:
            refused += 1
    assert 0 < refused < 300
