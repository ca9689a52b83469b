"""Which tensors of a checkpoint hold each weight of a model, and reading them. Where a weight goes it does not know.

A weight lies in one tensor, or is quantised and lies in several, which need not be in one file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open

from baton.models.checkpoint import Checkpoint, StoredTensor
from baton.models.quantization.layouts import QuantizedSource, find_quantized
from baton.models.quantization.scheme import Quantization
from baton.models.quantization.weight import QuantizedWeight
from baton.node.errors import SettingsError
from baton.node.telemetry import excerpt, log_event

logger = logging.getLogger("weights")

Source: TypeAlias = "StoredTensor | QuantizedSource"
"""What holds a weight."""
Shape: TypeAlias = "tuple[int, ...]"

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EXPERTS = ".experts."
"""In the names of tensors that one expert has."""
UNUSED_SUFFIXES = (
    ".rotary_emb.inv_freq",  # of old folders: follows from the config
    *(".weight_shape", ".input_scale", ".input_scale_ub", ".input_zero_point", ".activation_scale"),
    *(".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".output_scale"),  # of KV, which is not quantised
)
QUANTIZED_SUFFIXES = (".qweight", ".weight_packed", ".weight_scale", ".weight_scale_inv")
PLAIN = ""
"""The role of the one tensor of a weight that is not quantised."""


def find_sources(
    checkpoint: Checkpoint, shapes: Mapping[str, Shape], tied: bool, quantization: Quantization | None
) -> dict[str, Source]:
    """What holds each weight. SettingsError if nothing does, or a header names another shape or type."""
    sources: dict[str, Source] = {}
    missing = []
    for name, shape in shapes.items():
        source = _find(checkpoint, name, shape, quantization)
        if source is None and tied and name == EMBEDDING:
            # of two tensors in one memory safetensors may save either
            source = _find(checkpoint, HEAD, shape, quantization)
        if source is None:
            missing.append(name)
        else:
            sources[name] = source
    hint = _hint(checkpoint) if quantization is None else ""
    if missing:
        raise SettingsError(
            f"{checkpoint.folder}: tensor {min(missing)} is missing ({len(missing)} of {len(shapes)} are){hint}"
        )
    for name, source in sources.items():
        if isinstance(source, QuantizedSource):
            continue
        form, shape = checkpoint.forms[source.name], shapes[name]
        if form.shape != shape or not form.is_floating_point:
            found, wanted = f"{form.dtype} {list(form.shape)}", f"floating point {list(shape)}"
            raise SettingsError(f"{checkpoint.folder}: tensor {source.name} is {found}, expected {wanted}{hint}")
    return sources


def _find(checkpoint: Checkpoint, name: str, shape: Shape, quantization: Quantization | None) -> Source | None:
    """What holds the weight `name`, of this shape if it is quantised."""
    quantized = find_quantized(checkpoint, name, shape, quantization) if quantization else None
    return quantized or checkpoint.find(name)


def _parts(source: Source) -> Mapping[str, StoredTensor]:
    return {PLAIN: source} if isinstance(source, StoredTensor) else source.tensors


def _hint(checkpoint: Checkpoint) -> str:
    if any(name.endswith(QUANTIZED_SUFFIXES) for name in checkpoint.holders):
        return "; tensors are there of quantised weights, of which config.json has no 'quantization_config'"
    return ""


def has_own_head(checkpoint: Checkpoint, shape: Shape, quantization: Quantization | None) -> bool:
    """Whether the files hold a head that differs from the embedding: then the config that ties them is wrong."""
    embedding, head = (_find(checkpoint, name, shape, quantization) for name in (EMBEDDING, HEAD))
    if embedding is None or head is None or _are_equal(checkpoint, embedding, head):
        return False
    log_event(
        logger,
        "head_not_tied",
        level=logging.WARNING,
        folder=checkpoint.folder.name,
        why="lm_head differs from embedding",
    )
    return True


def _are_equal(checkpoint: Checkpoint, one: Source, other: Source) -> bool:
    first, second = _parts(one), _parts(other)
    if first.keys() != second.keys() or any(
        checkpoint.forms[first[role].name] != checkpoint.forms[second[role].name] for role in first
    ):
        return False
    (_, these), (_, those) = next(read_sources(checkpoint, {"": one})), next(read_sources(checkpoint, {"": other}))
    return all(torch.equal(_bytes(these[role]), _bytes(those[role])) for role in first)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def log_unused(checkpoint: Checkpoint, sources: dict[str, Source], tied: bool, left_out: tuple[str, ...]) -> None:
    """Tensors that the model of this config has no place for are left out, as transformers does; left_out: parts of
    the names of those that this is known of."""
    used = {stored.name for source in sources.values() for stored in _parts(source).values()}
    unused = checkpoint.holders.keys() - used
    head = checkpoint.find(HEAD) if tied else None
    unused = {name for name in unused if not name.endswith(UNUSED_SUFFIXES) and (head is None or name != head.name)}
    unused = {name for name in unused if not any(part in name for part in left_out)}
    if unused:
        log_event(
            logger,
            "tensors_unused",
            level=logging.WARNING,
            folder=checkpoint.folder.name,
            count=len(unused),
            first=min(unused),
        )


def read_forms(checkpoint: Checkpoint, sources: Mapping[str, Source]) -> dict[str, QuantizedWeight]:
    """Of weights that are quantised: sizes and types, without numbers but for the groups of inputs."""
    forms = {}
    with_groups: dict[str, list[tuple[str, QuantizedSource, str]]] = {}
    for name, source in sources.items():
        if isinstance(source, QuantizedSource):
            groups = source.groups_of_inputs
            if groups is None:
                forms[name] = source.form(checkpoint)
            else:
                with_groups.setdefault(groups.file, []).append((name, source, groups.name))
    for file_name, found in with_groups.items():  # files of many tensors are slow to open
        with _opened(checkpoint, file_name) as file:
            for name, source, groups_name in found:
                forms[name] = source.form(checkpoint, file.get_tensor(groups_name))
    return forms


def read_sources(
    checkpoint: Checkpoint, sources: Mapping[str, Source]
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Each name with the tensors of its source, by role; file by file."""

    def order(name: str) -> tuple[str, str]:
        first = next(iter(_parts(sources[name]).values()))
        return first.file, first.name

    for file_name, names in groupby(sorted(sources, key=order), lambda name: order(name)[0]):
        with _opened(checkpoint, file_name) as file:
            for name in names:
                parts = _parts(sources[name])
                elsewhere = {role: stored for role, stored in parts.items() if stored.file != file_name}
                tensors = {
                    role: file.get_tensor(stored.name) for role, stored in parts.items() if role not in elsewhere
                }
                for role, stored in elsewhere.items():
                    with _opened(checkpoint, stored.file) as other:
                        tensors[role] = other.get_tensor(stored.name)
                yield name, tensors


@contextmanager
def _opened(checkpoint: Checkpoint, file_name: str) -> Iterator[safe_open]:
    path = checkpoint.folder / file_name
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise SettingsError(f"{path}: not a whole safetensors file: {excerpt(error)}") from None
