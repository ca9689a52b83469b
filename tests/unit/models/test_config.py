"""Reading a model folder's configuration: the shape, both spellings of rope, and a clear error for what is wrong."""

import json

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from baton.models.config import ARCHITECTURES, ModelConfig, UnsupportedModel
from baton.models.expert_rules import DEEPSEEK_V2_EXPERTS, DEEPSEEK_V3_EXPERTS
from baton.models.experts_config import read_experts
from baton.models.families import FAMILIES as RULES
from baton.models.folder import JsonObject
from baton.models.rope import inverse_frequencies
from baton.models.rope_config import RopeConfig
from baton.node.errors import SettingsError

PLAIN = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
NEEDED = {"DeepseekV2ForCausalLM": {"num_experts_per_tok": 2}}
"""Keys for which a family has no default."""
QWEN2 = PLAIN | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}


def write(folder, config, generation=None):
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder, config, generation=None) -> ModelConfig:
    return ModelConfig.from_folder(write(folder, config, generation))


def test_defaults_of_a_short_config(tmp_path):
    """Guards against a default that differs from transformers', which older folders rely on."""
    config = read(tmp_path, PLAIN | {"eos_token_id": 3})
    theirs = transformers.LlamaConfig(**{key: value for key, value in PLAIN.items() if key != "architectures"})
    assert config.head_dim == theirs.head_dim == 16
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.rope == RopeConfig("default", theirs.rope_parameters["rope_theta"], config.head_dim)
    assert not (config.tie_word_embeddings or config.qkv_bias or config.o_bias or config.mlp_bias or config.qk_norm)
    assert config.sliding_window is None and config.windowed_layers == (False,) * 4
    assert config.eos_token_ids == (3,)
    assert config.max_model_len == 256 and config.group_size == 2


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": [1, 2]}, None, (1, 2)),
        ({"eos_token_id": 1}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": 1}, {"temperature": 0.5}, (1,)),
        ({"eos_token_id": 0}, {"eos_token_id": None}, (0,)),
        ({}, None, ()),
    ],
)
def test_end_tokens(tmp_path, config, generation, expected):
    """Guards against generations that never end: generation_config.json decides, else config.json."""
    assert read(tmp_path, PLAIN | config, generation).eos_token_ids == expected


@pytest.mark.parametrize(
    ("config", "window", "layers"),
    [
        (PLAIN | {"sliding_window": 8}, None, (False,) * 4),  # Llama has none, whatever the config says
        (PLAIN | {"architectures": ["MistralForCausalLM"], "sliding_window": 8}, 8, (True,) * 4),
        (PLAIN | {"architectures": ["MistralForCausalLM"], "sliding_window": None}, None, (False,) * 4),
        (PLAIN | {"architectures": ["MistralForCausalLM"]}, 4096, (True,) * 4),
        (QWEN2 | {"max_window_layers": 3}, 8, (False, False, False, True)),
        (QWEN2 | {"max_window_layers": 0}, 8, (True,) * 4),
        (QWEN2 | {"max_window_layers": 4}, None, (False,) * 4),
        (QWEN2 | {"use_sliding_window": False, "max_window_layers": 0}, None, (False,) * 4),
        (QWEN2 | {"layer_types": ["sliding_attention", *["full_attention"] * 3]}, 8, (True, False, False, False)),
    ],
)
def test_sliding_windows(tmp_path, config, window, layers):
    """Guards against a window where transformers has none, and the reverse."""
    found = read(tmp_path, config)
    assert (found.sliding_window, found.windowed_layers) == (window, layers)


ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False, "beta_fast": 16},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 0.5},
    {"rope_type": "yarn", "factor": 2.0},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: "-".join(map(str, rope.values())))
@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling", "rope_scaling with type"])
def test_frequencies_equal_those_of_transformers_bit_for_bit(tmp_path, rope, spelling):
    """Guards against a scaling that is nearly right, which shows only far into a long text."""
    theirs = transformers.LlamaConfig(
        **{key: value for key, value in PLAIN.items() if key != "architectures"},
        rope_parameters=rope | {"rope_theta": 5e5},
    )
    if spelling == "rope_parameters":
        config = read(tmp_path, PLAIN | {"rope_parameters": rope | {"rope_theta": 5e5}})
    elif spelling == "rope_scaling":
        config = read(tmp_path, PLAIN | {"rope_scaling": rope, "rope_theta": 5e5})
    else:
        old = {"type" if key == "rope_type" else key: value for key, value in rope.items()}
        config = read(tmp_path, PLAIN | {"rope_scaling": old, "rope_theta": 5e5})
    if rope["rope_type"] == "default":
        expected, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(theirs)
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, torch.device("cpu"))
    assert torch.equal(inverse_frequencies(config.rope), expected)
    assert config.rope.attention_factor == pytest.approx(factor, rel=1e-12)


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 2.0, 4.0, 6.5, 8.0, 16.0, 32.0, 64.0],
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("longest", [64, 65], ids=["short", "long"])
@pytest.mark.parametrize("more", [{}, {"factor": 4.0}, {"attention_factor": 1.25}, {"factor": 0.5}], ids=str)
def test_longrope_factors_follow_the_served_length(tmp_path, more, longest):
    """Guards against the factors of the other range, and against a scale of cos and sin that is left out."""
    rope = LONGROPE | more
    theirs = transformers.LlamaConfig(
        **{key: value for key, value in PLAIN.items() if key != "architectures"},
        rope_parameters=rope | {"rope_theta": 5e5},
    )
    config = read(tmp_path, PLAIN | {"rope_parameters": rope | {"rope_theta": 5e5}}).up_to(longest)
    expected, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, torch.device("cpu"), seq_len=longest)
    assert torch.equal(inverse_frequencies(config.rope), expected)
    assert config.rope.attention_factor == pytest.approx(factor, rel=1e-12)


def test_longrope_of_other_served_lengths_is_another_rope(tmp_path):
    """Guards against KV exchanged between workers that rotated keys with different factors: the identity is repr."""
    config = read(tmp_path, PLAIN | {"rope_parameters": LONGROPE})
    assert repr(config.up_to(64).rope) != repr(config.up_to(65).rope) == repr(config.up_to(100).rope)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"short_factor": None}, "'short_factor' is missing"),
        ({"long_factor": [1.0, 2.0]}, "'long_factor' must be a list of 8 numbers"),
        ({"long_factor": "1"}, "'long_factor' must be a list of finite numbers"),
        ({"short_factor": [1.0] * 7 + [0]}, "'short_factor' must be a list of finite numbers"),
        ({"original_max_position_embeddings": 1}, "must be at least 2"),
    ],
)
def test_broken_longrope_is_refused_by_its_key(tmp_path, change, message):
    with pytest.raises(SettingsError, match=message):
        read(tmp_path, PLAIN | {"rope_parameters": LONGROPE | change})


def test_yarn_folder_may_be_used_beyond_its_original_length(tmp_path):
    """Guards against long prompts refused: Qwen's yarn folders keep the original length in max_position_embeddings."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert read(tmp_path, PLAIN | {"rope_scaling": rope}).max_model_len == 1024


def test_unsupported_architecture_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModel) as caught:
        read(tmp_path, PLAIN | {"architectures": ["MambaForCausalLM"]})
    assert isinstance(caught.value, SettingsError)
    for name in ("MambaForCausalLM", *ARCHITECTURES):
        assert name in str(caught.value)


@pytest.mark.parametrize("spelling", ["type", "rope_type"])
def test_unknown_rope_type_is_refused_by_name(tmp_path, spelling):
    with pytest.raises(SettingsError, match=r"proportional.*supported: default, linear"):
        read(tmp_path, PLAIN | {"rope_scaling": {spelling: "proportional", "factor": 2.0}})


@pytest.mark.parametrize("empty", [{}, None])
def test_empty_rope_scaling_leaves_rope_parameters_in_force(tmp_path, empty):
    """Guards against the default rope in silence: tools that know both spellings leave an empty `rope_scaling`."""
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 777.0}
    plain = {key: value for key, value in PLAIN.items() if key != "architectures"}
    theirs = transformers.LlamaConfig(**plain, rope_scaling=empty, rope_parameters=dict(parameters)).rope_parameters
    rope = read(tmp_path, PLAIN | {"rope_scaling": empty, "rope_parameters": parameters}).rope
    assert (rope.kind, rope.theta, rope.factor) == (theirs["rope_type"], theirs["rope_theta"], theirs["factor"])


def test_null_rope_theta_is_refused(tmp_path):
    """Guards against a base that is guessed: transformers has none for it either."""
    with pytest.raises(SettingsError, match=r"config\.json.*rope_theta"):
        read(tmp_path, PLAIN | {"rope_theta": None})


FAMILIES = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
    "MixtralForCausalLM": transformers.MixtralConfig,
    "Qwen2MoeForCausalLM": transformers.Qwen2MoeConfig,
    "Qwen3MoeForCausalLM": transformers.Qwen3MoeConfig,
    "DeepseekV2ForCausalLM": transformers.DeepseekV2Config,
    "DeepseekV3ForCausalLM": transformers.DeepseekV3Config,
    "Glm4MoeForCausalLM": transformers.Glm4MoeConfig,
    "OlmoeForCausalLM": transformers.OlmoeConfig,
    "GptOssForCausalLM": transformers.GptOssConfig,
    "Phi3ForCausalLM": transformers.Phi3Config,
    "GemmaForCausalLM": transformers.GemmaConfig,
    "Gemma2ForCausalLM": transformers.Gemma2Config,
    "Gemma3ForCausalLM": transformers.Gemma3TextConfig,
}


HEADED = [name for name in ARCHITECTURES if RULES[name].latent is None]
"""Families whose KV has heads."""


@pytest.mark.parametrize("architecture", HEADED)
def test_absent_key_heads_are_those_of_transformers(tmp_path, architecture):
    shape = {key: value for key, value in PLAIN.items() if key not in ("architectures", "num_key_value_heads")}
    shape |= {"num_attention_heads": 32, "hidden_size": 128}
    config = read(tmp_path, shape | {"architectures": [architecture]})
    assert config.num_kv_heads == FAMILIES[architecture](**shape).num_key_value_heads


@pytest.mark.parametrize("architecture", HEADED)
def test_null_key_heads_are_as_many_as_query_heads(tmp_path, architecture):
    """Old folders of models without grouped queries say null."""
    null = {"architectures": [architecture], "num_key_value_heads": None}
    assert read(tmp_path, PLAIN | null).num_kv_heads == 4


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_absent_keys_are_those_of_transformers(tmp_path, architecture):
    """Guards against a default of another family; sizes and activations that are absent are errors or the family's."""
    short = PLAIN | {"architectures": [architecture], "num_hidden_layers": 12} | NEEDED.get(architecture, {})
    config, theirs = read(tmp_path, short), FAMILIES[architecture](**short)
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.activation == getattr(theirs, "hidden_activation", getattr(theirs, "hidden_act", None))
    if architecture in HEADED:
        assert config.head_dim == (
            getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
        )
    assert config.score_softcap == (getattr(theirs, "attn_logit_softcapping", None))
    assert config.logit_softcap == (getattr(theirs, "final_logit_softcapping", None))
    kinds = getattr(theirs, "layer_types", None) or ["full_attention"] * 12
    if architecture != "MistralForCausalLM":  # all of its layers, and no layer_types
        assert config.windowed_layers == tuple(kind == "sliding_attention" for kind in kinds)
    ropes = theirs.rope_parameters
    if "full_attention" in ropes:
        assert config.window_rope is not None
        assert config.window_rope.theta == ropes["sliding_attention"]["rope_theta"]
        ropes = ropes["full_attention"]
    assert config.rope.theta == ropes["rope_theta"]


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if RULES[name].experts is not None])
def test_absent_keys_of_experts_are_those_of_transformers(tmp_path, architecture):
    short = PLAIN | {"architectures": [architecture]} | NEEDED.get(architecture, {})
    found, theirs = read(tmp_path, short).experts, FAMILIES[architecture](**short)
    assert found is not None
    dense = getattr(theirs, "first_k_dense_replace", 0)
    assert found.layers == (False,) * dense + (True,) * (4 - dense)
    assert (found.num_experts, found.top_k) == (
        getattr(theirs, "num_local_experts", getattr(theirs, "num_experts", None)),
        theirs.num_experts_per_tok,
    )
    assert found.width == getattr(theirs, "moe_intermediate_size", 96)
    assert found.shared_width == getattr(
        theirs, "shared_expert_intermediate_size", getattr(theirs, "n_shared_experts", 0) * found.width
    )
    assert found.renormalised == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"mlp_only_layers": [0, 3]}, (False, True, True, False)),
        ({"decoder_sparse_step": 2}, (False, True, False, True)),
        ({"mlp_only_layers": [1], "decoder_sparse_step": 2}, (False, False, False, True)),
    ],
)
def test_layers_without_experts(tmp_path, keys, expected):
    """Guards against experts looked for in a layer that has none, and the other way round."""
    config = read(tmp_path, PLAIN | {"architectures": ["Qwen3MoeForCausalLM"]} | keys)
    assert config.experts is not None and config.experts.layers == expected
    assert config.full_step_tokens == 8192


def test_a_full_step_gives_each_expert_its_rows(tmp_path):
    """Guards the default of a prefill worker's steps."""
    assert read(tmp_path, PLAIN).full_step_tokens == 1024
    assert read(tmp_path, PLAIN | {"architectures": ["MixtralForCausalLM"]}).full_step_tokens == 4096


def deepseek(**keys):
    return read_experts(JsonObject("config.json", keys), DEEPSEEK_V3_EXPERTS, 6)


def test_experts_of_deepseek(tmp_path):
    """Guards the keys of a family whose rules decide more than one of them."""
    found = deepseek(n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=8)
    assert found.layers == (False,) * 3 + (True,) * 3 and found.shared_width == 8
    assert (found.num_groups, found.kept_groups, found.scale, found.renormalised) == (4, 2, 2.5, True)
    assert deepseek(first_k_dense_replace=1, moe_layer_freq=2).layers == (False, False, True, False, True, False)
    theirs = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": None, "topk_method": "greedy"}
    version_2 = read_experts(JsonObject("config.json", theirs), DEEPSEEK_V2_EXPERTS, 2)
    assert (version_2.num_groups, version_2.renormalised, version_2.scale) == (1, False, 1.0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_experts_per_tok": 300}, "at most n_routed_experts"),
        ({"n_group": 7}, "divisor of the 256 experts"),
        ({"n_group": 256}, "two experts in a group"),
        ({"topk_group": 9}, "at most n_group"),
        ({"n_group": 128, "topk_group": 2}, "room for 8 experts"),
        ({"topk_method": "greedy"}, "noaux_tc"),
        ({"scoring_func": "softmax"}, "sigmoid"),
    ],
)
def test_routes_that_nothing_here_computes_are_refused(keys, message):
    with pytest.raises(SettingsError, match=message):
        deepseek(**keys)


def test_gemma_3_spells_two_ropes_in_two_ways(tmp_path):
    """Guards against the global base in layers with a window, and a factor that reaches them."""
    gemma = PLAIN | {"architectures": ["Gemma3ForCausalLM"]}
    scaled = {"rope_type": "linear", "factor": 8.0}
    old = gemma | {"rope_theta": 2e6, "rope_local_base_freq": 3e4, "rope_scaling": scaled}
    by_kind = {
        "full_attention": scaled | {"rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    for config in (read(tmp_path, old), read(tmp_path, gemma | {"rope_parameters": by_kind})):
        assert config.window_rope is not None
        assert (config.rope.kind, config.rope.theta, config.rope.factor) == ("linear", 2e6, 8.0)
        assert (config.window_rope.kind, config.window_rope.theta) == ("default", 3e4)


@pytest.mark.parametrize("architecture", ["GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_attention_in_both_directions_is_refused(tmp_path, architecture):
    with pytest.raises(SettingsError, match="use_bidirectional_attention"):
        read(tmp_path, PLAIN | {"architectures": [architecture], "use_bidirectional_attention": True})


def test_softcaps_of_null_are_none(tmp_path):
    gemma = PLAIN | {"architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": None}
    assert read(tmp_path, gemma).score_softcap is None


def test_default_key_heads_that_do_not_fit_are_refused(tmp_path):
    short = {key: value for key, value in PLAIN.items() if key != "num_key_value_heads"}
    with pytest.raises(SettingsError, match="'num_key_value_heads' is missing, and its default, 8"):
        read(tmp_path, short | {"architectures": ["MistralForCausalLM"]})


@pytest.mark.parametrize("dtype", ["auto", "float64", None])
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_a_folder_decides_nothing(tmp_path, key, dtype):
    """Guards against a refusal for a key that no worker reads: --dtype says in what weights are held."""
    assert read(tmp_path, PLAIN | {key: dtype}) == read(tmp_path, PLAIN)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("absent", [None, []])
def test_model_type_stands_in_for_absent_architectures(tmp_path, architecture, absent):
    model_type = FAMILIES[architecture].model_type
    config = read(tmp_path, PLAIN | {"architectures": absent, "model_type": model_type} | NEEDED.get(architecture, {}))
    assert config.architecture == architecture


@pytest.mark.parametrize("name", ["LlamaModel", "Qwen3Model"])
def test_folder_saved_without_a_head_names_its_family(tmp_path, name):
    assert read(tmp_path, PLAIN | {"architectures": [name]}).architecture == name.replace("Model", "ForCausalLM")


def test_unsupported_model_type_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModel, match="gpt2"):
        read(tmp_path, PLAIN | {"architectures": None, "model_type": "gpt2"})


def test_model_type_of_another_family_is_refused(tmp_path):
    """Guards against another model in silence: transformers goes by model_type, we by the architecture."""
    with pytest.raises(SettingsError, match="'model_type' must be that of 'architectures'"):
        read(tmp_path, PLAIN | {"model_type": "mistral"})


@pytest.mark.parametrize("key", [key for key in PLAIN if key != "num_key_value_heads"])
def test_missing_key_is_named(tmp_path, key):
    with pytest.raises(SettingsError, match=f"config.json.*'{key}' is missing"):
        read(tmp_path, {name: value for name, value in PLAIN.items() if name != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "100"),
        ("vocab_size", True),
        ("hidden_size", 64.0),
        ("hidden_size", -64),
        ("hidden_size", 65),
        ("num_hidden_layers", 0),
        ("num_attention_heads", []),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", -1),
        ("tie_word_embeddings", 1),
        ("architectures", "LlamaForCausalLM"),
        ("architectures", []),
        ("architectures", [1]),
        ("hidden_act", "gelu"),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"type": "linear"}),
        ("rope_scaling", {"type": "linear", "factor": "2"}),
        ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
        ("partial_rotary_factor", 0.5),
        ("quantization_config", {"quant_method": "nvfp4"}),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, -2]),
    ],
)
def test_wrong_value_is_named(tmp_path, key, value):
    """Guards against a Python traceback, or a model of another shape, where a config is wrong."""
    named = "factor" if isinstance(value, dict) and "type" in value else key
    with pytest.raises(SettingsError, match=rf"config.json.*{named}"):
        read(tmp_path, PLAIN | {key: value})


@pytest.mark.parametrize("layer_types", [["full_attention"] * 3, ["full_attention"] * 3 + ["chunked_attention"]])
def test_layer_types_that_do_not_fit_are_refused(tmp_path, layer_types):
    with pytest.raises(SettingsError, match="layer_types"):
        read(tmp_path, QWEN2 | {"layer_types": layer_types})


@pytest.mark.parametrize("text", ["", '{"architectures": ["Llama', "[1, 2]", "\x00", "[" * 100_000])
def test_file_that_is_no_json_object_is_named(tmp_path, text):
    with pytest.raises(SettingsError, match=r"config\.json"):
        read(tmp_path, text)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere.config\.json"):
        ModelConfig.from_folder(tmp_path / "nowhere")


def test_broken_generation_config_is_named(tmp_path):
    write(tmp_path, PLAIN)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"generation_config\.json"):
        ModelConfig.from_folder(tmp_path)
