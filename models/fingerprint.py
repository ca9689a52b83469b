"""Identity of a model folder, so that KV of different weights can never meet. No torch, and no weights are read.

The digest covers config.json and of each shard its name, its size, the SHA-256 of its safetensors header, which lists
every tensor with dtype, shape and place, and that of 64 samples of 4 KiB spread evenly over the file. The samples
differ between a model and its fine-tune, whose header is the same; a change of a few single weights can slip between.
Reading all weights would cost a start of a 16 GB model many seconds in a process that has no other use for them.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from baton.models.folder import JsonObject
from baton.node.errors import SettingsError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
NUM_SAMPLES = 64
SAMPLE_BYTES = 4096
DUMMY_SEED, DUMMY_STD = 0, 0.02
"""Of the normal distribution that `--load-format dummy` draws weights from."""


def weight_files(folder: Path) -> dict[str, tuple[str, ...]]:
    """Tensor names by shard file name, after the index; a single file gives an empty tuple (all its tensors).

    SettingsError when there are no weights, or a shard that the index names is missing.
    """
    if not (folder / INDEX_NAME).exists():
        if not (folder / SINGLE_NAME).exists():
            raise SettingsError(f"{folder}: neither {SINGLE_NAME} nor {INDEX_NAME} is there")
        return {SINGLE_NAME: ()}
    index = JsonObject.from_file(folder / INDEX_NAME)
    weight_map = index.child("weight_map")
    if weight_map is None:
        raise SettingsError(f"{index.where}: 'weight_map' is missing")
    shards: dict[str, list[str]] = {}
    for name in weight_map.fields:
        shards.setdefault(weight_map.text(name), []).append(name)
    for shard in shards:
        if Path(shard).name != shard:
            raise SettingsError(f"{index.where}: shard {shard!r} is not a plain file name")
        if not (folder / shard).is_file():
            raise SettingsError(f"{folder / shard}: shard is missing; {INDEX_NAME} names it")
    return {shard: tuple(names) for shard, names in shards.items()}


def model_fingerprint(folder: Path, load_format: str = "auto", device: str = "cpu") -> bytes:
    """32 bytes. `dummy` weights are random: they follow from config.json and from the kind of device that draws them,
    "cpu" or "cuda", so these stand in for the shards."""
    digest = hashlib.sha256(b"baton-model-1\0")
    try:
        config = (folder / "config.json").read_bytes()
    except OSError as error:
        raise SettingsError(f"{folder / 'config.json'}: cannot be read: {error.strerror}") from None
    digest.update(load_format.encode() + b"\0" + hashlib.sha256(config).digest())
    if load_format == "dummy":
        digest.update(f"{device} seed {DUMMY_SEED} std {DUMMY_STD}".encode())
    else:
        for shard in sorted(weight_files(folder)):
            digest.update(hashlib.sha256(shard.encode()).digest() + _shard_digest(folder / shard))
    return digest.digest()


def _shard_digest(path: Path) -> bytes:
    """Header: 8 bytes length, little endian, then that many bytes of JSON (the safetensors format)."""
    digest = hashlib.sha256()
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise SettingsError(f"{path}: not a whole safetensors file")
            digest.update(struct.pack("<Q", size) + prefix + file.read(length))
            for sample in range(NUM_SAMPLES):
                file.seek((size - 8 - length) * sample // NUM_SAMPLES + 8 + length)
                digest.update(file.read(SAMPLE_BYTES))
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.digest()
