"""The shape of a model, read from a Hugging Face folder: config.json and generation_config.json. No torch, no weights.

Where a key is absent the default is the one that transformers has for that family; a default that would be a guess at
the shape of a real model is an error instead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from baton.models.experts_config import ExpertsConfig, read_experts
from baton.models.families import FAMILIES, LOGIT_SOFTCAP, MODEL_TYPES, SCORE_SOFTCAP, Family, Windows
from baton.models.folder import MAX_LENGTH, JsonObject
from baton.models.latent_config import LatentConfig, read_latent
from baton.models.quantization.scheme import Quantization, read_quantization
from baton.models.rope_config import RopeConfig, read_ropes, score_factor
from baton.node.decoder_config import decoder_config
from baton.node.errors import SettingsError
from baton.node.messages.base import MAX_TOKEN_ID
from baton.node.model_folder import MAX_END_TOKENS, MAX_VOCAB_SIZE
from baton.node.telemetry import excerpt

ARCHITECTURES = tuple(FAMILIES)
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM, MAX_WIDTH = 4096, 1 << 14, 1 << 13, 1 << 22
"""Many times what any model has: a config.json that says more is broken, and is refused before memory is allocated."""

FULL_STEP_TOKENS, MOST_STEP_TOKENS = 1024, 8192
"""Rows with which a product computes as many a second as with more, but for 2 % (docs/benchmarks/steps.md); and the
longest step that is aimed at."""
SWITCHED_WINDOWS = (Windows.QWEN, Windows.QWEN_MOE, Windows.SWITCHED)
"""Which count only with `use_sliding_window`."""


class UnsupportedModel(SettingsError):
    """The folder holds an architecture that no code here runs; names it and what is supported."""

    def __init__(self, architecture: str) -> None:
        super().__init__(
            f"model architecture {excerpt(architecture, 80)} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
        self.architecture = architecture
        self.supported = ARCHITECTURES


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder. Sizes are counts of elements, lengths are tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    """Units of a token's KV; of latent attention, whose heads share a row, one."""
    head_dim: int
    """Of a row of KV."""
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    window_rope: RopeConfig | None
    """Of layers with a window, where theirs is another."""
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Queries and keys are normed before rope, head by head."""
    merged_projections: bool
    """In the checkpoint, which has qkv_proj and gate_up_proj."""
    activation: str
    """Of the MLP's gate, as transformers names it."""
    unit_offset_norms: bool
    """Norms multiply by 1 + weight, and before they round."""
    output_norms: bool
    """What attention and the MLP add to the residual is normed before."""
    embedding_scale: float
    score_scale: float
    """Of queries times keys."""
    score_softcap: float | None
    """Scores s become softcap * tanh(s / softcap)."""
    logit_softcap: float | None
    sliding_window: int | None
    """A token of a windowed layer sees itself and the sliding_window - 1 before it; None: no layer is windowed."""
    windowed_layers: tuple[bool, ...]
    """Which layers use the window; all False when there is none."""
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    quantization: Quantization | None
    """Of the folder's weights; None: all are plain."""
    experts: ExpertsConfig | None = None
    """None: all MLPs are dense."""
    latent: LatentConfig | None = None
    """None: attention is over cached keys and values."""
    whole_qk_norm: bool = False
    """With qk_norm: all query heads of a token are normed together, and all key heads."""
    sinks: bool = False
    """Each query head has a learned score more, whose weight goes nowhere."""
    num_draft_layers: int = 0
    """In the checkpoint, behind the others: they would predict further tokens, and are not run."""
    through: str = ""
    """What runs the model where no code here does, and its version; then fields that only native code reads are
    without meaning."""

    @property
    def max_model_len(self) -> int:
        """The longest sequence that this model is made for, tokens.

        For `dynamic` rope this is a hard limit. Past the original length it derives new frequencies from the current
        length, but keys in the cache were rotated with older ones, so the result would depend on how the sequence was
        cut into steps; up to that length it is exactly the unscaled rope. YaRN folders often keep the original length
        in max_position_embeddings, so there the factor counts.
        """
        if self.rope.kind == "yarn":
            return max(self.max_position_embeddings, int(self.rope.original_max_position * self.rope.factor))
        return self.max_position_embeddings

    @property
    def full_step_tokens(self) -> int:
        """From so many tokens on a step on a GPU computes hardly more of them a second.

        Experts get a part of the tokens each, and their weights are read for any number of them.
        """
        if self.experts is None:
            return FULL_STEP_TOKENS
        return min(MOST_STEP_TOKENS, FULL_STEP_TOKENS * self.experts.num_experts // self.experts.top_k)

    @property
    def group_size(self) -> int:
        """Query heads that share one key head."""
        return self.num_heads // self.num_kv_heads

    @property
    def kv_planes(self) -> int:
        """Rows of a token in a unit: key and value, or the one of latent attention."""
        return 2 if self.latent is None else 1

    def up_to(self, max_model_len: int) -> ModelConfig:
        """The configuration of a server whose sequences have at most so many tokens."""
        window_rope = None if self.window_rope is None else self.window_rope.up_to(max_model_len)
        return replace(self, rope=self.rope.up_to(max_model_len), window_rope=window_rope)

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads the folder's configuration; raises SettingsError, or UnsupportedModel, which is one."""
        config = JsonObject.from_file(folder / "config.json")
        config = JsonObject(config.where, decoder_config(config.fields))
        return _read(config, folder / "generation_config.json")


def _read(config: JsonObject, generation_path: Path) -> ModelConfig:
    architecture = _architecture(config)
    family = FAMILIES[architecture]
    if config.text(family.activation_key, family.activation) not in (family.activation, family.old_activation):
        raise config.wrong(family.activation_key, f"'{family.activation}'")
    if config.flag("use_bidirectional_attention", False):
        raise config.wrong("use_bidirectional_attention", "false: all attention here is causal")
    for key in family.refused:
        if config.has(key):
            raise config.wrong(key, "null: nothing here computes it")
    hidden_size = config.integer("hidden_size", most=MAX_WIDTH)
    num_heads = config.integer("num_attention_heads", most=MAX_HEADS)
    num_layers = config.integer("num_hidden_layers", most=MAX_LAYERS)
    max_position = config.integer("max_position_embeddings")
    latent = None if family.latent is None else read_latent(config, family.latent)
    if latent is None:
        num_kv_heads, head_dim = _num_kv_heads(config, family, num_heads), _head_dim(config, family, num_heads)
    else:
        num_kv_heads, head_dim = 1, latent.row_dim
    window, windowed = _windows(config, family, num_layers)
    rope, window_rope = read_ropes(config, family, max_position, latent.rotated_dim if latent else head_dim)
    if rope.kind == "yarn" and rope.original_max_position * rope.factor > MAX_LENGTH:
        raise SettingsError(f"{config.where}: the rope's factor makes sequences longer than {MAX_LENGTH} tokens")
    attention_bias = family.reads_attention_bias and config.flag("attention_bias", family.default_attention_bias)
    return ModelConfig(
        architecture=architecture,
        vocab_size=config.integer("vocab_size", most=MAX_VOCAB_SIZE),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=config.integer("intermediate_size", most=MAX_WIDTH),
        rms_norm_eps=config.number("rms_norm_eps", family.default_eps),
        rope=rope,
        window_rope=window_rope,
        tie_word_embeddings=config.flag("tie_word_embeddings", family.default_tied),
        qkv_bias=attention_bias or family.always_qkv_bias or (family.reads_qkv_bias and config.flag("qkv_bias", True)),
        o_bias=attention_bias and family.attention_bias_of_o,
        mlp_bias=family.reads_mlp_bias and config.flag("mlp_bias", False),
        qk_norm=family.qk_norm or (family.reads_qk_norm and config.flag("use_qk_norm", False)),
        merged_projections=family.merged_projections,
        activation=family.activation,
        unit_offset_norms=family.like_gemma,
        output_norms=family.output_norms,
        embedding_scale=math.sqrt(hidden_size) if family.like_gemma else 1.0,
        score_scale=_score_scale(config, family, rope, latent.query_dim if latent else head_dim),
        score_softcap=_softcap(config, family, SCORE_SOFTCAP),
        logit_softcap=_softcap(config, family, LOGIT_SOFTCAP),
        sliding_window=window,
        windowed_layers=windowed,
        max_position_embeddings=max_position,
        eos_token_ids=eos_token_ids(config, generation_path),
        quantization=read_quantization(config, generation_path.parent),
        experts=None if family.experts is None else read_experts(config, family.experts, num_layers),
        latent=latent,
        whole_qk_norm=family.whole_qk_norm,
        sinks=family.sinks,
        num_draft_layers=config.integer("num_nextn_predict_layers", 0, least=0, most=MAX_LAYERS),
    )


def _architecture(config: JsonObject) -> str:
    """The class that runs the model. Folders without `architectures` are known by `model_type`, as in transformers, and
    a folder saved from the decoder without a head (`LlamaModel`) holds a causal language model too."""
    family = config.text("model_type") if config.has("model_type") else None
    if config.fields.get("architectures") in (None, []):
        if family is None:
            raise SettingsError(f"{config.where}: 'architectures' is missing, and so is 'model_type'")
        if family not in MODEL_TYPES:
            raise UnsupportedModel(f"of model_type {excerpt(family, 80)!r}")
        return MODEL_TYPES[family]
    names = config.texts("architectures")
    if len(names) != 1:
        raise config.wrong("architectures", "a list of one name")
    name = names[0]
    architecture = f"{name.removesuffix('Model')}ForCausalLM" if name.endswith("Model") else name
    if architecture not in ARCHITECTURES:
        raise UnsupportedModel(name)
    if family is not None and MODEL_TYPES.get(family) != architecture:
        raise config.wrong("model_type", f"that of 'architectures' ({excerpt(name, 80)})")
    return architecture


def _num_kv_heads(config: JsonObject, family: Family, num_heads: int) -> int:
    if "num_key_value_heads" in config.fields:
        num_kv_heads = config.integer("num_key_value_heads", num_heads)
    else:
        num_kv_heads = family.default_kv_heads or num_heads
    if num_heads % num_kv_heads:
        expected = f"a divisor of num_attention_heads ({num_heads})"
        if "num_key_value_heads" in config.fields:
            raise config.wrong("num_key_value_heads", expected)
        raise SettingsError(
            f"{config.where}: 'num_key_value_heads' is missing, and its default, {num_kv_heads}, is not {expected}"
        )
    return num_kv_heads


def _head_dim(config: JsonObject, family: Family, num_heads: int) -> int:
    hidden_size = config.integer("hidden_size")
    if family.default_head_dim is None and not config.has("head_dim") and hidden_size % num_heads:
        raise config.wrong("hidden_size", f"a multiple of num_attention_heads ({num_heads})")
    head_dim = config.integer("head_dim", family.default_head_dim or hidden_size // num_heads, most=MAX_HEAD_DIM)
    if head_dim % 2:
        raise config.wrong("head_dim", "even")
    return head_dim


def _score_scale(config: JsonObject, family: Family, rope: RopeConfig, query_dim: int) -> float:
    scalar = config.number("query_pre_attn_scalar", 256.0) if family.reads_query_scalar else query_dim
    return float(scalar**-0.5 * (1.0 if family.latent is None else score_factor(config, rope)))


def _softcap(config: JsonObject, family: Family, key: str) -> float | None:
    """Absent is the family's default; null is none."""
    if key not in family.softcaps or (key in config.fields and not config.has(key)):
        return None
    default = family.softcaps[key]
    return config.number(key) if config.has(key) else default


def _windows(config: JsonObject, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The sliding window and the layers that have it, by the rules of each family in transformers."""
    none = (None, (False,) * num_layers)
    if family.windows is Windows.NONE or (
        family.windows in SWITCHED_WINDOWS and not config.flag("use_sliding_window", False)
    ):
        return none
    if not config.has("sliding_window") and ("sliding_window" in config.fields or family.default_window is None):
        return none
    window = config.integer("sliding_window", family.default_window)
    if family.windows in (Windows.ALL, Windows.SWITCHED):
        return window, (True,) * num_layers
    if not config.has("layer_types"):
        if family.windows is Windows.ALTERNATING:
            pattern = config.integer("sliding_window_pattern", family.default_pattern)
            windowed = tuple((layer + 1) % pattern != 0 for layer in range(num_layers))
        else:
            turn = config.integer("max_window_layers", 28, least=0)
            if family.windows is Windows.QWEN_MOE:
                windowed = tuple(layer < turn and layer % 2 == 0 for layer in range(num_layers))
            else:
                windowed = tuple(layer >= turn for layer in range(num_layers))
    else:
        kinds = config.texts("layer_types")
        if len(kinds) != num_layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
            raise config.wrong("layer_types", f"{num_layers} names out of full_attention and sliding_attention")
        windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return (window, windowed) if any(windowed) else none


def eos_token_ids(config: JsonObject, generation_path: Path) -> tuple[int, ...]:
    """generation_config.json decides where it says something, as in transformers' generate; else config.json."""
    source = config
    if generation_path.exists():
        generation = JsonObject.from_file(generation_path)
        source = generation if generation.has("eos_token_id") else config
    value = source.fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    found = tuple(item for item in ids if isinstance(item, int) and not isinstance(item, bool))
    if len(found) != len(ids) or not all(0 <= item <= MAX_TOKEN_ID for item in found):
        raise source.wrong("eos_token_id", "a token id or a list of them")
    if len(found) > MAX_END_TOKENS:
        raise source.wrong("eos_token_id", f"a list of at most {MAX_END_TOKENS} token ids")
    return found
