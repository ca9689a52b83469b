"""Which file of a model folder holds each weight, by the rules of transformers' from_pretrained. No torch: of the files
only the headers are read.

`model.safetensors` comes before an index. Of an index only the files that it names count, with all that they hold; if
it is missing, which transformers does not take, a whole set of shards by their names. Of several copies of a tensor
that in the last file by name is taken. Names may lack the leading `model.` (saved from the decoder without its head) or
have it once more than they should; those of the decoder of a model that sees images may have `language_model.` before
or behind it.
"""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from baton.models.folder import JsonObject
from baton.node.errors import SettingsError
from baton.node.modelhub import CONVERT_GGUF
from baton.node.telemetry import excerpt, log_event

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PREFIX, DECODER = "model.", "language_model."
_SHARD = re.compile(r"model-([0-9]{5})-of-([0-9]{5})\.safetensors")
MAX_NAME_BYTES = 255
"""Of a file, in every common file system."""
MAX_INDEX_BYTES = 64 << 20
"""The index of a model with a hundred shards has a few MB."""
MAX_HEADER_BYTES = 32 << 20
"""Of a safetensors file: names, types and shapes, about 120 bytes for each tensor."""

logger = logging.getLogger("checkpoint")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a safetensors file of the folder."""

    file: str
    name: str


class TensorForm(NamedTuple):
    """What the header of a safetensors file says of a tensor; the file has as many bytes."""

    dtype: str
    """As the format writes it: BF16, F32, I8 ..."""
    shape: tuple[int, ...]

    @property
    def is_floating_point(self) -> bool:
        """Numbers of 16 bits or more: shorter ones need scales."""
        return self.dtype in ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights of a folder: its safetensors files, and by name the file that each stored tensor is read from."""

    folder: Path
    files: tuple[str, ...]
    holders: dict[str, str]
    forms: dict[str, TensorForm]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """SettingsError when there are no weights, a file is missing or cut off, or the index is wrong."""
        files = _files(folder)
        holders: dict[str, str] = {}
        forms: dict[str, TensorForm] = {}
        for file in files:
            for name, form in _header(folder / file):
                holders[name], forms[name] = file, form
        return cls(folder, files, holders, forms)

    def find(self, name: str) -> StoredTensor | None:
        """The tensor that fills the weight `name`, or None; SettingsError when two names mean it."""
        bare = name.removeprefix(PREFIX)
        spellings = dict.fromkeys((name, PREFIX + name, bare, DECODER + name, f"{PREFIX}{DECODER}{bare}"))
        found = [spelling for spelling in spellings if spelling in self.holders]
        if len(found) > 1:
            raise SettingsError(f"{self.folder}: tensors {' and '.join(found)} are both {name}")
        return StoredTensor(self.holders[found[0]], found[0]) if found else None


def _files(folder: Path) -> tuple[str, ...]:
    single, index = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.is_file():
        if index.exists():
            log_event(
                logger, "index_ignored", level=logging.WARNING, folder=folder.name, file=SINGLE_NAME, index=INDEX_NAME
            )
        return (SINGLE_NAME,)
    if not index.exists():
        if shards := _shards_without_index(folder):
            log_event(logger, "index_missing", level=logging.WARNING, folder=folder.name, shards=len(shards))
            return shards
        raise SettingsError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there{_what_to_do(folder)}")
    weight_map = JsonObject.from_file(index, MAX_INDEX_BYTES).child("weight_map")
    if weight_map is None:
        raise SettingsError(f"{index}: 'weight_map' is missing")
    files = sorted({weight_map.text(name) for name in weight_map.fields})
    for file in files:
        if Path(file).name != file or not file.isprintable() or len(file.encode()) > MAX_NAME_BYTES:
            raise SettingsError(f"{index}: shard {excerpt(file, 80)!r} is not a plain file name")
        if not (folder / file).is_file():
            raise SettingsError(f"{folder / file}: shard is missing; {INDEX_NAME} names it")
    return tuple(files)


def _shards_without_index(folder: Path) -> tuple[str, ...]:
    """All of `model-00001-of-00002.safetensors` and so on, or none; SettingsError if some are missing."""
    names = (path.name for path in folder.glob("model-*.safetensors"))
    found = {name: match for name in names if (match := _SHARD.fullmatch(name))}
    counts = {int(match[2]) for match in found.values()}
    if not found:
        return ()
    if len(counts) != 1 or sorted(int(match[1]) for match in found.values()) != list(range(1, max(counts) + 1)):
        raise SettingsError(
            f"{folder}: {INDEX_NAME} is missing, and {len(found)} files named as shards are not all of one model "
            f"({', '.join(sorted(found)[:3])})"
        )
    return tuple(sorted(found))


def _what_to_do(folder: Path) -> str:
    """About weights in other formats."""
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return (
            f"; {pickles[0]} is a pickle, which can run code, and is never read. Convert the folder to safetensors "
            "where its code may run: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER) of "
            "transformers, and copy the tokenizer's files"
        )
    if any(folder.glob("*.gguf")):
        return f"; {CONVERT_GGUF}"
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return f"; {others[0]} is there, but files of other names are not read, as their tensors have other names"
    return "; weights are read from safetensors files only"


def _header(path: Path) -> Iterator[tuple[str, TensorForm]]:
    """Name and form of each tensor. The library checks that they cover the file's bytes exactly."""
    try:
        with path.open("rb") as raw:
            (header_bytes,) = struct.unpack("<Q", raw.read(8).ljust(8, b"\0"))
        if header_bytes > MAX_HEADER_BYTES:
            raise SettingsError(
                f"{path}: not a whole safetensors file: a header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
            )
        with safe_open(path, framework="np") as file:
            for name in list(file.keys()):
                tensor = file.get_slice(name)
                yield name, TensorForm(tensor.get_dtype(), tuple(tensor.get_shape()))
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"{path}: not a whole safetensors file: {excerpt(error)}") from None
