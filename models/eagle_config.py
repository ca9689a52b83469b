"""The shape of an EAGLE-3 draft, read from a published folder, for the model that it drafts for. No torch, no weights.

A draft is one decoder layer over the embedding of a token and the hidden states of the model at the place before, and
a head over a vocabulary of its own (Y. Li and others, EAGLE-3, 2025, https://arxiv.org/abs/2503.01840). Folders come in
two layouts: a Llama configuration with a few more fields (the authors', SpecForge), and that of the library
speculators, which has the layer's configuration in `transformer_layer_config`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from baton.models.config import MAX_HEAD_DIM, MAX_HEADS, MAX_WIDTH, ModelConfig
from baton.models.families import FAMILIES
from baton.models.folder import JsonObject
from baton.models.partition import Rank
from baton.models.rope_config import RopeConfig, read_ropes
from baton.node.errors import SettingsError
from baton.node.model_folder import MAX_VOCAB_SIZE

EAGLE = "eagle:"
"""Before the folder of a draft, in the setting that names it."""
NO_STATIC_SCALES = "--kv-dtype fp8_static with --speculate eagle: a draft has no scales; use fp8"
NESTED = "transformer_layer_config"
UNSUPPORTED_FLAGS = ("attention_bias", "mlp_bias", "norm_before_fc", "fc_norm", "norm_output", "use_qk_norm")


@dataclass(frozen=True, slots=True)
class EagleConfig:
    """One draft layer. `model_size` is the hidden size of the model that it drafts for."""

    hidden_size: int
    model_size: int
    taps: tuple[int, ...]
    """Its input is the residual of the model before these layers, side by side."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: RopeConfig
    draft_vocab_size: int
    """Tokens that it may draft."""
    vocab_size: int
    """The model's."""
    norm_before_residual: bool
    """The layer's residual begins with the normed hidden state, not with the hidden state."""

    @property
    def tapped_size(self) -> int:
        return len(self.taps) * self.model_size

    def part_of(self, rank: Rank) -> EagleConfig:
        """One rank's heads, rows of the MLP and tokens to draw from in the place of all, as partition.part_of has them;
        the draft's head stays whole. SettingsError, with the numbers, if ranks cannot share the draft."""
        if rank.count > 1 and self.hidden_size != self.model_size:
            raise SettingsError(
                f"--speculate eagle with {rank.count} ranks: hidden_size of the draft is {self.hidden_size}, of the "
                f"model {self.model_size}, and ranks on GPUs exchange rows of the model's size alone"
            )
        return replace(
            self,
            num_heads=len(rank.share(self.num_heads, "query heads of the draft")),
            num_kv_heads=len(rank.key_heads(self.num_kv_heads)),
            intermediate_size=len(rank.share(self.intermediate_size, "rows of the draft's MLP")),
            vocab_size=len(rank.vocabulary(self.vocab_size)),
        )


def read_eagle(folder: Path, model: ModelConfig) -> EagleConfig:
    """SettingsError for a folder that is no EAGLE-3 draft, or one of another model, with both sizes."""
    if model.through:
        raise SettingsError(f"--speculate eagle: {model.architecture} runs through transformers, which drafts nothing")
    if model.latent is not None:
        raise SettingsError(f"--speculate eagle: the KV of {model.architecture} is latent, and that of a draft is not")
    whole = JsonObject.from_file(folder / "config.json")
    layer = whole.child(NESTED) or whole
    _refuse_unsupported(whole, layer)
    hidden_size = layer.integer("hidden_size", most=MAX_WIDTH)
    num_heads = layer.integer("num_attention_heads", most=MAX_HEADS)
    num_kv_heads = layer.integer("num_key_value_heads", num_heads, most=MAX_HEADS)
    head_dim = layer.integer("head_dim", max(1, hidden_size // num_heads), most=MAX_HEAD_DIM)
    vocab_size = layer.integer("vocab_size", model.vocab_size, most=MAX_VOCAB_SIZE)
    sizes = (
        ("vocab_size", vocab_size, model.vocab_size),
        ("num_key_value_heads", num_kv_heads, model.num_kv_heads),
        ("head_dim", head_dim, model.head_dim),
        ("target_hidden_size", whole.integer("target_hidden_size", model.hidden_size), model.hidden_size),
    )
    for name, found, wanted in sizes:
        if found != wanted:
            raise SettingsError(f"{layer.where}: {name} of the draft is {found}, and of the model {wanted}")
    if num_heads % num_kv_heads:
        raise layer.wrong("num_attention_heads", f"a multiple of num_key_value_heads ({num_kv_heads})")
    rope, _ = read_ropes(layer, FAMILIES["LlamaForCausalLM"], layer.integer("max_position_embeddings", 2048), head_dim)
    return EagleConfig(
        hidden_size=hidden_size,
        model_size=model.hidden_size,
        taps=_taps(whole, model.num_layers),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=layer.integer("intermediate_size", most=MAX_WIDTH),
        rms_norm_eps=layer.number("rms_norm_eps", 1e-6),
        rope=rope,
        draft_vocab_size=whole.integer("draft_vocab_size", vocab_size, most=vocab_size),
        vocab_size=vocab_size,
        norm_before_residual=whole.flag("norm_before_residual", layer is not whole),
    )


def _refuse_unsupported(whole: JsonObject, layer: JsonObject) -> None:
    kind = whole.text("speculators_model_type", "eagle3")
    if kind != "eagle3":
        raise whole.wrong("speculators_model_type", "'eagle3'")
    if layer.integer("num_hidden_layers", 1) != 1:
        raise layer.wrong("num_hidden_layers", "1: drafts of one layer are served")
    if layer.text("hidden_act", "silu") != "silu":
        raise layer.wrong("hidden_act", "'silu'")
    nested = whole.child("eagle_config")
    if nested is not None and not nested.flag("use_aux_hidden_state", True):
        raise nested.wrong("use_aux_hidden_state", "true: without it the draft is not of EAGLE-3")
    for config in (whole, layer):
        for name in UNSUPPORTED_FLAGS:
            if config.flag(name, False):
                raise config.wrong(name, "false, as far as drafts are served")
        if config.has("quantization_config"):
            raise SettingsError(f"{config.where}: 'quantization_config' is there: drafts are served unquantised")


def _taps(whole: JsonObject, num_layers: int) -> tuple[int, ...]:
    """The layers of the model, counted from 0, before which hidden states are taken."""
    key = "eagle_aux_hidden_state_layer_ids"
    holder = whole if whole.has(key) else whole.child("eagle_config") or whole
    if not holder.has(key):
        taps: tuple[int, ...] = (2, num_layers // 2, num_layers - 3)
    else:
        value = holder.fields[key]
        found = value if isinstance(value, list) else []
        taps = tuple(each for each in found if isinstance(each, int) and not isinstance(each, bool))
        if not taps or len(taps) != len(found):
            raise holder.wrong(key, "a list of layers' numbers")
    if not all(0 <= tap < num_layers for tap in taps):
        raise SettingsError(
            f"{holder.where}: the draft takes hidden states before layers {', '.join(map(str, taps))} of the model, "
            f"which has {num_layers}"
        )
    return taps
