"""Reads the tensors of an adapter's file. What they mean, it does not know."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from baton.node.errors import AdapterError
from baton.node.telemetry import excerpt

MAX_TENSORS, MAX_HEADER_BYTES = 120_000, 32 << 20
"""Pairs of each projection of 256 experts in 58 layers are 89,088 tensors."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], bytes]:
    """By name, and the SHA-256 of the file, whose bytes are read once. Raises AdapterError."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from None
    (header_bytes,) = struct.unpack("<Q", data[:8].ljust(8, b"\0"))
    if header_bytes > MAX_HEADER_BYTES:
        raise AdapterError(f"{path}: not a whole safetensors file: a header of {header_bytes} bytes")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file: {excerpt(error)}") from None
    if len(tensors) > MAX_TENSORS:
        raise AdapterError(f"{path}: {len(tensors)} tensors, at most {MAX_TENSORS} are read")
    return tensors, hashlib.sha256(data).digest()


def checked(name: str, tensor: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Raises AdapterError for numbers that are not finite, which would spoil blocks that other sequences get later."""
    if tensor.dtype not in DTYPES or tensor.dim() != dimensions:
        kind = "matrix" if dimensions == 2 else "vector"
        raise AdapterError(f"tensor {excerpt(name)}: is {tensor.dtype} {list(tensor.shape)}, not a {kind} of floats")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"tensor {excerpt(name)}: has numbers that are not finite")
    return tensor
