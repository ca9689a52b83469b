"""Identity of a model folder, so that KV of different weights can never meet. No torch.

The digest covers config.json, files beside it that say how weights are quantised, and every byte of the files that
weights are read from. Files are hashed in chunks, a chunk's SHA-256 is a leaf of the file's, so that threads share the
work; they run beside the load, which reads the same pages of the page cache. Nothing is kept between starts: no time
stamp proves that a file is what it was.
"""

from __future__ import annotations

import hashlib
import os
import struct
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from baton.models.checkpoint import Checkpoint
from baton.models.quantization.recipe import Recipe
from baton.models.quantization.scheme import SIDE_FILES
from baton.node.errors import SettingsError

CHUNK_BYTES = 16 << 20
"""A leaf of a file's digest; part of the identity."""
READ_BYTES = 1 << 20  # stays in a core's cache between the read and the hash
MAX_THREADS = 8
DUMMY_SEED, DUMMY_STD = 1, 0.02
"""Of the normal distribution that `--load-format dummy` draws weights from."""


class FileState(NamedTuple):
    """What a file system says of a file; it differs once the file was written or replaced."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int


class Leaves(NamedTuple):
    """A file that is being hashed."""

    path: Path
    state: FileState
    digests: tuple[Future[bytes], ...]


class FingerprintTask:
    """Hashes a model folder on threads of its own from construction on; a context manager, which ends them.

    `dummy` weights are random: they follow from config.json and from the kind of device that draws them, "cpu" or
    "cuda", so these stand in for the files. A recipe by which weights are quantised at load counts, too.
    """

    def __init__(
        self, folder: Path, load_format: str = "auto", device: str = "cpu", recipe: Recipe | None = None
    ) -> None:
        self._folder, self._load_format, self._device, self._recipe = folder, load_format, device, recipe
        num_threads = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))  # the load needs a core too
        self._threads = ThreadPoolExecutor(num_threads, "fingerprint")
        self._files = self._threads.submit(self._submit_chunks)

    def result(self) -> bytes:
        """32 bytes, once all is hashed. SettingsError for a broken folder, or a file that was written meanwhile: call
        it after the load, so that it speaks for the bytes that were loaded."""
        digest = hashlib.sha256(b"baton-model-2\0" + self._load_format.encode() + b"\0")
        if self._load_format == "dummy":
            digest.update(f"{self._device} seed {DUMMY_SEED} std {DUMMY_STD}".encode())
        if self._recipe is not None:
            digest.update(hashlib.sha256(self._recipe.identity).digest())
        for path, state, leaves in self._files.result():
            whole = hashlib.sha256(struct.pack("<Q", state.size_bytes))
            for leaf in leaves:
                whole.update(leaf.result())
            if _state(path) != state:
                raise SettingsError(f"{path}: was changed while it was read")
            digest.update(hashlib.sha256(path.name.encode()).digest() + whole.digest())
        return digest.digest()

    def close(self) -> None:
        """Chunks that no thread has begun are dropped."""
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> FingerprintTask:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit_chunks(self) -> list[Leaves]:
        paths = [self._folder / "config.json"]
        states = [_state(path) for path in paths]  # without one there is no model, whatever else is here
        if self._load_format != "dummy":
            beside = [path for name in SIDE_FILES if (path := self._folder / name).is_file()]
            paths += beside + [self._folder / file for file in Checkpoint.open(self._folder).files]
            states += [_state(path) for path in paths[1:]]
        return [
            Leaves(
                path,
                state,
                tuple(
                    self._threads.submit(_chunk_digest, path, start, min(CHUNK_BYTES, state.size_bytes - start))
                    for start in range(0, state.size_bytes, CHUNK_BYTES)
                ),
            )
            for path, state in zip(paths, states, strict=True)
        ]


def model_fingerprint(
    folder: Path, load_format: str = "auto", device: str = "cpu", recipe: Recipe | None = None
) -> bytes:
    """The 32 bytes of a FingerprintTask, waited for."""
    with FingerprintTask(folder, load_format, device, recipe) as task:
        return task.result()


def _state(path: Path) -> FileState:
    try:
        stat = path.stat()
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    return FileState(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _chunk_digest(path: Path, start: int, size_bytes: int) -> bytes:
    """SHA-256 of a part of a file; both the read and the hash run without the GIL."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(READ_BYTES, size_bytes)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while size_bytes:
                count = file.readinto(buffer[:size_bytes])
                if not count:
                    raise SettingsError(f"{path}: was changed while it was read")
                digest.update(buffer[:count])
                size_bytes -= count
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.digest()
