"""models.eagle_config and models.eagle_weights: published layouts are read, what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.models.config import ModelConfig
from baton.models.eagle_config import read_eagle
from baton.models.eagle_weights import load_eagle
from baton.models.partition import Rank
from baton.models.weights import load_weights
from baton.node.errors import SettingsError
from baton.tests.unit.models.eagle_folders import MIDLAYER, SPECULATORS, random_draft


@pytest.fixture
def model(tmp_path) -> tuple[Path, ModelConfig]:
    folder = tmp_path / "model"
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 131,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder, ModelConfig.from_folder(folder)


def read(draft: Path, model: tuple[Path, ModelConfig]):
    folder, config = model
    weights = load_weights(config, folder, torch.float32, load_format="dummy", pack=False)
    return load_eagle(read_eagle(draft, config), draft, weights, "auto", pack=False)


@pytest.mark.parametrize("prefix", [MIDLAYER, SPECULATORS, "model.layers.0."])
def test_layouts_of_published_folders_are_read(tmp_path, model, prefix):
    """Guards against a layout whose tensors are not found, and tokens of the draft taken for those of the model."""
    tensors = random_draft(tmp_path / "draft", model[1], prefix)
    weights = read(tmp_path / "draft", model)
    joined = torch.cat([tensors[f"{MIDLAYER}self_attn.{name}_proj.weight"] for name in "qkv"])
    assert torch.equal(weights.qkv.weight, joined)
    assert torch.equal(weights.head.weight, tensors["lm_head.weight"])
    assert weights.tokens.tolist() == tensors["t2d"].nonzero().flatten().tolist()
    config = read_eagle(tmp_path / "draft", model[1])
    assert config.taps == (2, 4, 5)
    assert config.norm_before_residual == (prefix == SPECULATORS)


def test_taps_are_read_from_both_places(tmp_path, model):
    """Guards against hidden states of the default layers where the folder names others."""
    random_draft(tmp_path / "draft", model[1], eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 7]})
    assert read_eagle(tmp_path / "draft", model[1]).taps == (1, 3, 7)
    random_draft(tmp_path / "draft", model[1], eagle_aux_hidden_state_layer_ids=[0, 6])
    assert read_eagle(tmp_path / "draft", model[1]).taps == (0, 6)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"vocab_size": 130}, ("vocab_size", "130", "131")),
        ({"num_key_value_heads": 4, "num_attention_heads": 8}, ("num_key_value_heads", "4", "2")),
        ({"head_dim": 32}, ("head_dim", "32", "16")),
        ({"target_hidden_size": 64}, ("target_hidden_size", "64", "48")),
        ({"draft_vocab_size": 132}, ("draft_vocab_size", "132", "131")),
        ({"num_hidden_layers": 2}, ("num_hidden_layers", "2", "1")),
        ({"eagle_aux_hidden_state_layer_ids": [2, 8]}, ("2, 8", "has 8")),
        ({"eagle_config": {"use_aux_hidden_state": False}}, ("use_aux_hidden_state",)),
        ({"attention_bias": True}, ("attention_bias",)),
        ({"fc_norm": True}, ("fc_norm",)),
        ({"hidden_act": "gelu"}, ("hidden_act", "silu")),
        ({"speculators_model_type": "eagle"}, ("speculators_model_type", "eagle3")),
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config",)),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_with_both_sizes(tmp_path, model, fields, named):
    """Guards against a draft of another model that is computed all the same, or an error that does not say why."""
    random_draft(tmp_path / "draft", model[1])
    path = tmp_path / "draft" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(SettingsError) as error:
        read_eagle(tmp_path / "draft", model[1])
    assert all(each in str(error.value) for each in named), str(error.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fc.weight": torch.zeros(48, 96)}, ("fc.weight", "[48, 96]", "[48, 144]")),
        ({"lm_head.weight": torch.zeros(97, 48)}, ("lm_head.weight", "[97, 48]", "[98, 48]")),
        ({"d2t": torch.zeros(98)}, ("d2t", "F32", "whole numbers")),
        ({"d2t": torch.full((98,), 40)}, ("d2t", "does not have")),
        ({"d2t": None}, ("d2t", "98", "131")),
        ({"lm_head.weight": None}, ("lm_head.weight", "missing")),
        ({f"{MIDLAYER}hidden_norm.weight": None}, ("hidden_norm", "missing")),
        ({f"{MIDLAYER}self_attn.q_norm.weight": torch.zeros(16)}, ("q_norm", "no place")),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, model, change, named):
    """Guards against tensors of another size that are read, and ones that are left out of what the draft computes."""
    random_draft(tmp_path / "draft", model[1])
    path = tmp_path / "draft" / "model.safetensors"
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    save_file(tensors, path)
    with pytest.raises(SettingsError) as error:
        read(tmp_path / "draft", model)
    assert all(each in str(error.value) for each in named), str(error.value)


def test_the_embedding_of_another_size_must_be_in_the_folder(tmp_path, model):
    """Guards against the model's embedding where the draft's hidden states are of another size."""
    random_draft(tmp_path / "draft", model[1], hidden_size=40)
    assert read(tmp_path / "draft", model).embedding.shape == (131, 40)
    path = tmp_path / "draft" / "model.safetensors"
    save_file({name: each for name, each in load_file(path).items() if name != "embed_tokens.weight"}, path)
    with pytest.raises(SettingsError, match="hidden_size of the draft is 40, of the model 48"):
        read(tmp_path / "draft", model)


@pytest.mark.parametrize("count", [2, 4])
def test_parts_of_ranks_add_up_to_the_draft(tmp_path, model, count):
    """Guards against rows or columns of a draft that are another rank's, left out, or computed twice."""
    config = model[1]
    random_draft(tmp_path / "draft", config, intermediate_size=8 * count, num_attention_heads=2 * config.num_kv_heads)
    eagle = read_eagle(tmp_path / "draft", config)
    weights = load_weights(config, model[0], torch.float32, load_format="dummy", pack=False)
    ranks = [Rank(index, count) for index in range(count)]
    whole, *parts = (
        load_eagle(eagle, tmp_path / "draft", weights, "auto", pack=False, rank=rank) for rank in (Rank(), *ranks)
    )

    def added(draft, part) -> list[torch.Tensor]:
        """By the MLP, and by attention of equal weights to one token, whose query counts as well."""
        x, dim, groups = torch.linspace(-1, 1, eagle.hidden_size), eagle.head_dim, part.num_heads // part.num_kv_heads
        gate, up = (draft.gate_up.weight @ x).chunk(2)
        sizes = [part.num_heads * dim, part.num_kv_heads * dim, part.num_kv_heads * dim]
        query, key, value = (draft.qkv.weight @ torch.cat((x, x * x))).split(sizes)
        grouped = (key * value).view(-1, dim).repeat_interleave(groups, 0).view(-1)
        return [draft.down.weight @ (gate.sigmoid() * up), draft.o.weight @ (query * grouped)]

    found = [added(part, eagle.part_of(rank)) for part, rank in zip(parts, ranks, strict=True)]
    for own, expected in zip(zip(*found, strict=True), added(whole, eagle), strict=True):
        torch.testing.assert_close(torch.stack(own).sum(0), expected, rtol=1e-4, atol=1e-4)


def test_ranks_refuse_a_draft_of_another_width(tmp_path, model):
    """Guards against sums of rows that the memory between ranks has no room for."""
    random_draft(tmp_path / "draft", model[1], hidden_size=2 * model[1].hidden_size)
    eagle, wide = read_eagle(tmp_path / "draft", model[1]), 2 * model[1].hidden_size
    with pytest.raises(SettingsError, match=f"hidden_size of the draft is {wide}, of the model {wide // 2}"):
        eagle.part_of(Rank(0, 2))
