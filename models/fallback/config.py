"""What a worker has to know of a model that is not native before it is loaded: from config.json alone. No torch.

Names of keys differ from family to family; those that mean the same are tried in turn. The loaded model says the rest,
and its numbers replace these.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from baton.models.config import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_WIDTH,
    ModelConfig,
    UnsupportedModel,
    eos_token_ids,
)
from baton.models.families import MODEL_TYPES
from baton.models.folder import JsonObject
from baton.models.rope_config import RopeConfig
from baton.node.errors import SettingsError
from baton.node.model_folder import MAX_VOCAB_SIZE
from baton.node.telemetry import excerpt

LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "n_ctx")
INSTALL = "pip install 'baton-serve[transformers]'"


def model_config(folder: Path) -> ModelConfig:
    """Of a native model, or else of one that transformers may run; SettingsError for what cannot be served."""
    try:
        return ModelConfig.from_folder(folder)
    except UnsupportedModel as error:
        return _through_transformers(JsonObject.from_file(folder / "config.json"), folder, error)


def _through_transformers(config: JsonObject, folder: Path, native: UnsupportedModel) -> ModelConfig:
    if config.fields.get("model_type") in MODEL_TYPES:  # of a native family, but for another task
        raise native
    try:
        library = version("transformers")
    except PackageNotFoundError:
        raise SettingsError(f"{native}; others may run through transformers: {INSTALL}") from None
    if config.has("auto_map"):
        raise SettingsError(f"{config.where}: 'auto_map' names code in the folder, which is never run; {native}")
    if config.has("quantization_config"):
        raise SettingsError(f"{config.where}: quantised weights of {native.architecture} are not read; {native}")
    if not config.has("vocab_size"):  # its parts have their own: images, speech, an encoder
        raise native
    return described(config, folder, native.architecture, f"transformers {library}")


def described(config: JsonObject, folder: Path, architecture: str, through: str) -> ModelConfig:
    """Of any decoder, as far as its config.json says in names that are common."""
    num_heads = config.integer(_first(config, HEADS), most=MAX_HEADS)
    width = config.integer(_first(config, WIDTH), most=MAX_WIDTH)
    num_layers = config.integer(_first(config, LAYERS), most=MAX_LAYERS)
    head_dim = config.integer("head_dim", max(1, width // num_heads), most=MAX_HEAD_DIM)
    return ModelConfig(
        architecture=excerpt(architecture, 80),
        through=through,
        vocab_size=config.integer("vocab_size", most=MAX_VOCAB_SIZE),
        hidden_size=width,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=config.integer("num_key_value_heads", num_heads),
        head_dim=head_dim,
        intermediate_size=width,
        rms_norm_eps=1e-6,
        rope=RopeConfig("default", 10_000.0, head_dim),
        window_rope=None,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        merged_projections=False,
        activation="",
        unit_offset_norms=False,
        output_norms=False,
        embedding_scale=1.0,
        score_scale=head_dim**-0.5,
        score_softcap=None,
        logit_softcap=None,
        sliding_window=None,
        windowed_layers=(False,) * num_layers,
        max_position_embeddings=config.integer(_first(config, LONGEST)),
        eos_token_ids=eos_token_ids(config, folder / "generation_config.json"),
        quantization=None,
    )


def _first(config: JsonObject, names: tuple[str, ...]) -> str:
    """The name of these that is there; the first if none is, which an error then names."""
    return next((name for name in names if config.has(name)), names[0])
