"""Folders that are broken: each a clear error, before anything runs. And the identity of a folder."""

import json
import re

import pytest
import safetensors.torch
import torch

from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.fingerprint import model_fingerprint
from baton.models.weights import load_weights
from baton.node.errors import SettingsError


def load(folder, **options):
    return load_weights(ModelConfig.from_folder(folder), folder, torch.float32, **options)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_missing_tensor_is_named(make_model):
    folder = make_model("llama").folder
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(SettingsError, match=re.escape("model.layers.1.mlp.up_proj.weight is missing")):
        load(folder)


def test_missing_head_of_an_untied_model_is_named(make_model, edit_config):
    folder = make_model("llama", tie_word_embeddings=True).folder
    edit_config(folder, tie_word_embeddings=False)
    with pytest.raises(SettingsError, match=re.escape("lm_head.weight is missing")):
        load(folder)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "model.layers.2.self_attn.q_norm.weight"]
)
def test_wrong_shape_is_named(make_model, name):
    """Guards against broadcasting: a tensor of one element, or one row, would fill any place."""
    folder = make_model("qwen3").folder

    def shrink(tensors):
        tensors[name] = tensors[name][:1].clone()

    change_tensors(folder, shrink)
    with pytest.raises(SettingsError, match=re.escape(name)):
        load(folder)


def test_integer_weights_are_refused(make_model):
    """Guards against a quantised checkpoint that is read as if it were plain."""
    folder = make_model("llama").folder
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48, dtype=torch.int8)}))
    with pytest.raises(SettingsError, match="int8"):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -200])
def test_truncated_file_is_named(make_model, keep):
    folder = make_model("llama").folder
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SettingsError, match=re.escape("model.safetensors")):
        load(folder)


def test_missing_shard_is_named(make_model):
    folder = make_model("llama", shard_size="60KB").folder
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    for read in (load, model_fingerprint):
        with pytest.raises(SettingsError, match=shard.name):
            read(folder)


def test_shard_outside_the_folder_is_refused(make_model):
    """Guards against an index that makes the worker read any file of the machine."""
    folder = make_model("llama", shard_size="60KB").folder
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../secret.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(SettingsError, match="secret"):
        load(folder)


def test_tensor_that_the_index_names_but_the_shard_lacks(make_model):
    folder = make_model("llama", shard_size="60KB").folder
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    here = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(shard for shard in shards if shard != here)
    path.write_text(json.dumps(index))
    with pytest.raises(SettingsError, match=re.escape("model.norm.weight is missing")):
        load(folder)


def test_folder_without_weights(make_model):
    folder = make_model("llama").folder
    (folder / "model.safetensors").unlink()
    for read in (load, model_fingerprint):
        with pytest.raises(SettingsError, match=re.escape("model.safetensors")):
            read(folder)


def test_dummy_weights_are_the_same_everywhere(make_model, sequences, prompt):
    """Guards against a prefill and a decode worker that make different models out of one folder."""
    folder = make_model("qwen3", tie_word_embeddings=True).folder
    (folder / "model.safetensors").unlink()
    found = [sequences(ModelRunner.load(folder, load_format="dummy"), 1, 64).greedy(0, prompt, 3)[1] for _ in range(2)]
    assert torch.equal(*found)
    assert bool(found[0].isfinite().all()) and float(found[0].std()) > 0


def test_unknown_load_format_is_refused(make_model):
    with pytest.raises(SettingsError, match="pickle"):
        load(make_model("llama").folder, load_format="pickle")


def test_progress_counts_every_tensor(make_model):
    seen = []
    load(make_model("llama").folder, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 30) for done in range(1, 31)]  # 9 a layer, embedding, norm and head


def test_fingerprint_tells_folders_apart(make_model, edit_config):
    """Guards against KV of one model being taken for another's."""
    folder = make_model("llama", shard_size="60KB").folder
    seen = {model_fingerprint(folder), model_fingerprint(folder, "dummy")}
    assert model_fingerprint(folder) in seen and len(seen) == 2
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    tensors = safetensors.torch.load_file(shard)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in tensors.items()}, shard)
    seen.add(model_fingerprint(folder))  # other weights, equal header
    edit_config(folder, rms_norm_eps=1e-3)
    seen.add(model_fingerprint(folder))
    assert len(seen) == 4
    assert all(len(digest) == 32 for digest in seen)


def test_fingerprint_of_a_broken_file_is_an_error(make_model):
    folder = make_model("llama").folder
    path = folder / "model.safetensors"
    for content in (b"", b"1234", b"\xff" * 64, path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match="not a whole safetensors file"):
            model_fingerprint(folder)
