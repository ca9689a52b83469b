"""The folder of an adapter as PEFT saves it: its configuration, and the digest that names its content. No torch.

An adapter is what its numbers do: the digest covers the fields that change a product and all bytes of the weights, so
that two copies of a folder are one adapter, and other weights under the same name another. Which modules a model has,
and what the tensors hold, it does not know.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from baton.node.errors import AdapterError, SettingsError
from baton.node.model_folder import MAX_CONFIG_BYTES, checked_size, read_object
from baton.node.telemetry import excerpt

Value = TypeVar("Value")

CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_WEIGHTS_BYTES = 8 << 30
"""Rank 256 in all modules of a model of 70 billion weights has 6 GiB."""
MAX_RANK, MAX_ALPHA = 4096, 1e6
MAX_PATTERNS, MAX_PATTERN_CHARACTERS, MAX_REPETITIONS = 8192, 256, 2
"""Of rank_pattern and alpha_pattern; repetitions in one of them, since a search may try all ways to divide a name."""
MAX_COMPARISONS = 1 << 22
"""Of patterns with names of modules: 8,192 with 512 modules, or 227 with the 18,432 of 48 layers of 128 experts. A
pattern without a repetition takes about a microsecond for a name, one with two about twenty."""

APPLIED = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
"""Fields that change what the tensors do."""
NEUTRAL = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "target_modules",  # the tensors say it
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "lora_dropout",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
    "runtime_config",
    "eva_config",
)
"""Fields that say how it was trained, or where."""
INPUT_NAME = "embed_tokens"
"""Of the module that a list in `trainable_token_indices` is of."""
EXPERT_PARAMETERS = ("gate_up_proj", "down_proj")
"""What names in `target_parameters` may end in, beside weights of modules."""
INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Those that leave the model's own weights as they are."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What counts of an adapter_config.json."""

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    rank_stabilised: bool
    """The scaling is alpha / sqrt(rank), not alpha / rank (arXiv:2312.03732)."""
    has_magnitudes: bool = False
    """DoRA: rows of the changed weights have lengths of their own (arXiv:2402.09353)."""
    weights: frozenset[str] = frozenset()
    """Ends of names, such as mlp.gate.weight: what patterns name in the place of these modules."""
    tokens: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Of the embedding or the head, by its own name, the tokens whose rows are there, in this order."""

    @property
    def largest_rank(self) -> int:
        """That any module may have; rows of tokens count one each."""
        rows = (len(tokens) for _, tokens in self.tokens)
        return max(self.rank, *(rank for _, rank in self.rank_pattern), *rows, 0)

    def ranks_of(self, names: Mapping[str, str]) -> dict[str, int]:
        """By module. names: of each, in the model that was trained, such as model.layers.3.self_attn.q_proj. Raises
        AdapterError where a search would take minutes."""
        return _first_matches(self.rank_pattern, self.rank, self._adapted(names), "rank_pattern")

    def scalings_of(self, names: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
        """By module, with these names and ranks. Raises AdapterError as `ranks_of` does."""
        alphas = _first_matches(self.alpha_pattern, self.alpha, self._adapted(names), "alpha_pattern")
        return {
            module: alphas[module] / (math.sqrt(rank) if self.rank_stabilised else rank)
            for module, rank in ranks.items()
        }

    def digest(self, weights_digest: bytes) -> bytes:
        """Of the adapter with these weights, 32 bytes; `weights_digest`: SHA-256 of their file."""
        fields = [
            self.rank,
            self.alpha,
            self.rank_pattern,
            self.alpha_pattern,
            self.rank_stabilised,
            self.has_magnitudes,
        ]
        if self.weights and (self.rank_pattern or self.alpha_pattern):
            fields.append(sorted(self.weights))
        if self.tokens:
            fields.append(dict(self.tokens))
        return hashlib.sha256(b"adapter1" + weights_digest + json.dumps(fields).encode()).digest()

    def _adapted(self, names: Mapping[str, str]) -> Mapping[str, str]:
        """By module, what PEFT compares patterns with."""
        if not self.weights:
            return names
        return {module: f"{name}.weight" if self._adapts_weight(name) else name for module, name in names.items()}

    def _adapts_weight(self, name: str) -> bool:
        end = f"{name}.weight"
        while end and end not in self.weights:
            end = end.partition(".")[2]
        return end != ""


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What is known of an adapter without its numbers."""

    digest: bytes
    rank: int
    """The largest."""
    size_bytes: int
    """Of its weights' file."""


def read_facts(folder: Path) -> AdapterFacts:
    """Reads the configuration and every byte of the weights; takes about a second a GB. Raises AdapterError."""
    config = read_adapter_config(folder)
    path = weights_file(folder)
    try:
        with path.open("rb") as file:
            weights_digest = hashlib.file_digest(file, "sha256").digest()
            size_bytes = file.tell()
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read: {error.strerror}") from None
    return AdapterFacts(config.digest(weights_digest), config.largest_rank, size_bytes)


def weights_file(folder: Path) -> Path:
    """Raises AdapterError where there is none, or it is far too large."""
    path = folder / WEIGHTS_NAME
    try:
        checked_size(path, MAX_WEIGHTS_BYTES)
    except FileNotFoundError:
        if (folder / PICKLE_NAME).exists():
            raise AdapterError(
                f"{folder}: {PICKLE_NAME} is a pickle, which can run code, and is never read; save the adapter with "
                "safe_serialization=True"
            ) from None
        raise AdapterError(f"{folder}: {WEIGHTS_NAME} is missing") from None
    except SettingsError as error:
        raise AdapterError(str(error)) from None
    return path


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Raises AdapterError, which names the field, for what is no adapter or changes more than products."""
    path = folder / CONFIG_NAME
    try:
        fields = read_object(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise AdapterError(f"{folder}: {CONFIG_NAME} is missing") from None
    except SettingsError as error:
        raise AdapterError(str(error)) from None
    return config_of(fields, str(path))


def config_of(fields: dict[str, Any], where: str) -> AdapterConfig:
    """Of the fields of an adapter_config.json; `where` names it in errors."""
    if fields.get("peft_type") != "LORA":
        raise _wrong(where, fields, "peft_type", '"LORA"')
    if fields.get("bias", "none") != "none":
        raise _wrong(where, fields, "bias", '"none": trained biases are not supported')
    initialisation = fields.get("init_lora_weights", True)
    if initialisation not in INITIALISATIONS:
        raise _wrong(where, fields, "init_lora_weights", "one that leaves the model's weights alone")
    parameters = fields.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(_is_adapted(each) for each in parameters):
        ends = ", ".join(EXPERT_PARAMETERS)
        raise _wrong(where, fields, "target_parameters", f"names that end in {ends} or .weight")
    known = {*APPLIED, *NEUTRAL, "bias", "init_lora_weights", "target_parameters", "trainable_token_indices"}
    for name, value in fields.items():
        if name not in known and value not in (None, False, "", [], {}):
            raise AdapterError(f"{where}: {excerpt(name, 80)!r} is not supported, is {excerpt(value, 80)}")
    return AdapterConfig(
        rank=_rank(where, fields, "r", fields.get("r", 8)),
        alpha=_alpha(where, fields, "lora_alpha", fields.get("lora_alpha", 8)),
        rank_pattern=tuple(
            (pattern, _rank(where, fields, "rank_pattern", rank))
            for pattern, rank in _patterns(where, fields, "rank_pattern")
        ),
        alpha_pattern=tuple(
            (pattern, _alpha(where, fields, "alpha_pattern", alpha))
            for pattern, alpha in _patterns(where, fields, "alpha_pattern")
        ),
        rank_stabilised=bool(fields.get("use_rslora", False)),
        has_magnitudes=bool(fields.get("use_dora", False)),
        weights=frozenset(each for each in parameters if each.endswith(".weight")),
        tokens=_tokens(where, fields, "trainable_token_indices"),
    )


def _is_adapted(parameter: object) -> bool:
    if not isinstance(parameter, str):
        return False
    return parameter.endswith(".weight") or parameter.rpartition(".")[2] in EXPERT_PARAMETERS


def _tokens(where: str, fields: dict[str, Any], name: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    value = fields.get(name) or {}
    by_module = {INPUT_NAME: value} if isinstance(value, list) else value
    if not isinstance(by_module, dict) or not all(map(_is_tokens, by_module.values())):
        raise _wrong(where, fields, name, f"lists of 1 to {MAX_RANK} different tokens")
    found = {module.rpartition(".")[2]: tuple(tokens) for module, tokens in by_module.items()}
    if len(found) < len(by_module):
        raise _wrong(where, fields, name, "of modules with different names")
    return tuple(sorted(found.items()))


def _is_tokens(value: object) -> bool:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        return False
    return 1 <= len(value) <= MAX_RANK and len(set(value)) == len(value)


def _rank(where: str, fields: dict[str, Any], name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_RANK:
        raise _wrong(where, fields, name, f"of whole numbers from 1 to {MAX_RANK}")
    return value


def _alpha(where: str, fields: dict[str, Any], name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_ALPHA:
        raise _wrong(where, fields, name, f"of numbers up to {MAX_ALPHA:g}")
    return float(value)


def _patterns(where: str, fields: dict[str, Any], name: str) -> list[tuple[str, object]]:
    value = fields.get(name) or {}
    if not isinstance(value, dict) or len(value) > MAX_PATTERNS:
        raise _wrong(where, fields, name, f"an object of at most {MAX_PATTERNS} fields")
    for pattern in value:
        repetitions = len(re.findall(r"[*+?{]", pattern))
        nested = re.search(r"\)\s*[*+?{]", pattern) is not None
        if len(pattern) > MAX_PATTERN_CHARACTERS or repetitions > MAX_REPETITIONS or nested or not _is_regex(pattern):
            raise AdapterError(f"{where}: {name!r}: {excerpt(pattern, 80)!r} is no pattern of module names")
    return list(value.items())


def _is_regex(pattern: str) -> bool:
    try:
        _compiled(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _compiled(pattern: str) -> re.Pattern[str]:
    """As PEFT has it: of the name, or its end behind a dot."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _first_matches(
    patterns: Collection[tuple[str, Value]], default: Value, modules: Mapping[str, str], field: str
) -> dict[str, Value]:
    """By module. The first pattern that matches its name counts. Each is compiled once, and compared with the names
    that are left."""
    if len(patterns) * len(modules) > MAX_COMPARISONS:
        raise AdapterError(
            f"{field!r}: {len(patterns)} patterns times {len(modules)} modules are more than {MAX_COMPARISONS} "
            "comparisons; write fewer patterns, each of many modules"
        )
    found, left = dict.fromkeys(modules, default), dict(modules)
    for pattern, value in patterns:
        matches = _compiled(pattern).match
        matched = {module for module, name in left.items() if matches(name)}
        if matched:
            found.update(dict.fromkeys(matched, value))
            left = {module: name for module, name in left.items() if module not in matched}
    return found


def _wrong(where: str, fields: dict[str, Any], name: str, expected: str) -> AdapterError:
    return AdapterError(f"{where}: {name!r} must be {expected}; is {excerpt(fields.get(name), 80)}")
