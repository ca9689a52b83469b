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

from baton.models.checkpoint import Checkpoint
from baton.node.errors import SettingsError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
NUM_SAMPLES = 64
SAMPLE_BYTES = 4096
DUMMY_SEED, DUMMY_STD = 0, 0.02
"""Of the normal distribution that `--load-format dummy` draws weights from."""


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
        for shard in Checkpoint.open(folder).files:
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
