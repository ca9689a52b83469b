"""Folders that are broken: each a clear error, before anything runs. And the identity of a folder."""

import json
import re
import shutil
import threading

import pytest
import safetensors.torch
import torch
import transformers

from baton import kernels
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.fingerprint import CHUNK_BYTES, FingerprintTask, model_fingerprint
from baton.models.partition import Rank
from baton.models.weights import load_weights
from baton.node.errors import SettingsError


def load(folder, **options):
    return load_weights(ModelConfig.from_folder(folder), folder, torch.float32, **options)


def change_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


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
    with pytest.raises(SettingsError, match="is I8"):
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


def logits(model, prompt):
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0, -1:].float()


@pytest.fixture
def as_transformers(sequences, prompt):
    """Asserts that the runner reads of a folder what transformers reads; gives the logits."""

    def check(folder):
        theirs = logits(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), prompt)
        ours = sequences(ModelRunner.load(folder), 1, 64).greedy(0, prompt, 1)[1]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        return ours

    return check


def random_like(tensor):
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(4)) * 0.2


def test_own_head_of_a_folder_that_says_tied_is_used(make_model, as_transformers, prompt):
    """Guards against another model in silence: the config ties what the files do not."""
    made = make_model("llama", tie_word_embeddings=True)

    def add_head(tensors):
        tensors["lm_head.weight"] = random_like(tensors["model.embed_tokens.weight"])

    change_tensors(made.folder, add_head)
    assert not torch.allclose(as_transformers(made.folder), logits(made.reference, prompt), atol=0.1)


def test_equal_head_of_a_tied_folder_is_not_kept_twice(make_model):
    folder = make_model("llama", tie_word_embeddings=True).folder
    change_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    )
    weights = load(folder, pack=False)
    assert weights.lm_head.weight is weights.embedding


def test_tied_folder_that_holds_only_the_head(make_model, as_transformers, prompt):
    """safetensors saves one of two tensors in one memory, the first by name."""
    made = make_model("llama", tie_word_embeddings=True)
    change_tensors(
        made.folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")})
    )
    torch.testing.assert_close(as_transformers(made.folder), logits(made.reference, prompt), rtol=1e-4, atol=1e-4)


def test_untied_folder_without_an_embedding_is_refused(make_model):
    folder = make_model("llama").folder
    change_tensors(folder, lambda tensors: tensors.pop("model.embed_tokens.weight"))
    with pytest.raises(SettingsError, match=re.escape("model.embed_tokens.weight is missing")):
        load(folder)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: f"model.{name}",
        lambda name: f"model.{name.removeprefix('model.')}",
    ],
)
def test_names_with_one_prefix_less_or_more(make_model, as_transformers, rename):
    """Folders saved from the decoder without its head, and those of trainers that wrap the model."""
    folder = make_model("qwen3").folder

    def rename_all(tensors):
        renamed = {rename(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    change_tensors(folder, rename_all)
    as_transformers(folder)


def test_two_tensors_of_one_meaning_are_refused(make_model):
    folder = make_model("llama").folder
    change_tensors(folder, lambda tensors: tensors.update({"norm.weight": random_like(tensors["model.norm.weight"])}))
    with pytest.raises(SettingsError, match=re.escape("model.norm.weight and norm.weight are both model.norm.weight")):
        load(folder)


def test_whole_file_comes_before_an_index(make_model, as_transformers, prompt):
    """Guards against the old weights of a folder into which one file of new ones was saved."""
    made = make_model("llama", shard_size="60KB")
    tensors = {}
    for shard in made.folder.glob("model-*.safetensors"):
        tensors |= safetensors.torch.load_file(shard)
    tensors["lm_head.weight"] = random_like(tensors["lm_head.weight"])
    safetensors.torch.save_file(tensors, made.folder / "model.safetensors", metadata={"format": "pt"})
    with_shards = model_fingerprint(made.folder)
    assert not torch.allclose(as_transformers(made.folder), logits(made.reference, prompt), atol=0.1)
    (made.folder / "model.safetensors.index.json").unlink()
    assert model_fingerprint(made.folder) == with_shards  # shards that are not read are no part of the identity


def test_shards_without_an_index(make_model, sequences, prompt):
    """Guards a folder whose index was not copied, and one of whose shards some were not: a part of a model is none."""
    made = make_model("llama", shard_size="60KB")
    (made.folder / "model.safetensors.index.json").unlink()
    _, found = sequences(ModelRunner.load(made.folder), 1, 64).greedy(0, prompt, 1)
    torch.testing.assert_close(found, logits(made.reference, prompt), atol=1e-4, rtol=1e-4)
    last = sorted(made.folder.glob("model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(SettingsError, match=r"index\.json is missing, and .* are not all of one model"):
        load(made.folder)
    for shard in made.folder.glob("model-*.safetensors"):
        shard.unlink()
    last.with_name("consolidated.safetensors").touch()
    with pytest.raises(SettingsError, match=r"consolidated\.safetensors is there, but"):
        load(made.folder)


@pytest.mark.parametrize("position", [0, -1])
def test_unlisted_copy_of_a_tensor_in_a_shard(make_model, as_transformers, position):
    """Guards against a traceback, and against the copy that transformers does not take."""
    folder = make_model("llama", shard_size="60KB").folder
    shard = sorted(folder.glob("model-*.safetensors"))[position]
    tensors = safetensors.torch.load_file(shard)
    held = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    copied = next(name for name, file in held.items() if file != shard.name and name.endswith("up_proj.weight"))
    tensors[copied] = torch.ones(80, 48) * 0.1
    safetensors.torch.save_file(tensors, shard, metadata={"format": "pt"})
    as_transformers(folder)


def test_tensor_in_another_shard_than_the_index_says(make_model, as_transformers):
    folder = make_model("llama", shard_size="60KB").folder
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    shards = sorted(set(index["weight_map"].values()))
    here = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = next(shard for shard in shards if shard != here)
    path.write_text(json.dumps(index))
    as_transformers(folder)


def test_tensors_without_a_place_are_named_in_the_log(make_model, as_transformers, caplog):
    folder = make_model("llama").folder
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}))
    as_transformers(folder)
    assert "tensors_unused" in caplog.text and "q_proj.bias" in caplog.text


@pytest.mark.parametrize(("drafts", "rank", "warned"), [(1, Rank(), 0), (0, Rank(), 1), (1, Rank(1, 2), 0)])
def test_layers_of_drafts_and_experts_of_other_ranks_are_no_surprise(drafts, rank, warned, make_model, caplog):
    """Guards against a warning that a whole folder is incomplete, or none where layers are left out by mistake."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    folder = make_model("glm4_moe", **experts, num_nextn_predict_layers=drafts).folder
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(4, 8)}))
    load(folder, rank=rank)
    assert caplog.text.count("tensors_unused") == warned


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


def write_bytes_at(path, offset, content):
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_fingerprint_covers_every_byte(make_model):
    """Guards against KV of edited weights in use: a sample of the file misses whole matrices."""
    folder = make_model("llama").folder
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path) | {"unused": torch.zeros(2 * CHUNK_BYTES // 4)}
    safetensors.torch.save_file(tensors, path)
    size_bytes = path.stat().st_size
    seen = {model_fingerprint(folder)}
    offsets = [
        size_bytes - 1,
        size_bytes // 3,
        CHUNK_BYTES - 1,
        CHUNK_BYTES,
        *range(CHUNK_BYTES + 5000, size_bytes, 7_000_003),
    ]
    for count, offset in enumerate(offsets, start=2):
        write_bytes_at(path, offset, b"\x55")
        seen.add(model_fingerprint(folder))
        assert len(seen) == count, offset


def test_fingerprint_follows_the_order_of_chunks(make_model):
    """Guards against a tree of digests in which two parts of a file may change places."""
    folder = make_model("llama").folder
    path = folder / "model.safetensors"
    part = CHUNK_BYTES // 4
    tensors = safetensors.torch.load_file(path) | {"unused": torch.cat([torch.zeros(2 * part), torch.ones(2 * part)])}
    safetensors.torch.save_file(tensors, path)
    before, content = model_fingerprint(folder), path.read_bytes()
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    chunks[1], chunks[3] = chunks[3], chunks[1]
    write_bytes_at(path, 0, b"".join(chunks))
    assert model_fingerprint(folder) != before


def test_fingerprint_does_not_depend_on_time_or_place(make_model, tmp_path_factory):
    """Two hosts with copies of one folder exchange KV, and nothing of an earlier start is trusted."""
    folder = make_model("llama", shard_size="60KB").folder
    copy = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(folder, copy)
    assert model_fingerprint(copy) == model_fingerprint(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_file_that_is_written_during_the_load_is_an_error(make_model, name):
    """Guards against an identity of other bytes than those that were loaded."""
    folder = make_model("llama").folder
    with FingerprintTask(folder) as task:
        task.result()
        replacement = folder / "new"
        replacement.write_bytes((folder / name).read_bytes())
        replacement.replace(folder / name)
        with pytest.raises(SettingsError, match=f"{name}: was changed"):
            task.result()


def test_fingerprint_that_is_not_waited_for_ends(make_model):
    """Guards against a worker whose load fails and that does not exit until 16 GB are hashed."""
    with FingerprintTask(make_model("llama").folder):
        pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fingerprint")]


def test_fingerprint_of_a_broken_file_is_an_error(make_model):
    folder = make_model("llama").folder
    path = folder / "model.safetensors"
    for content in (b"", b"1234", b"\xff" * 64, path.read_bytes()[:100]):
        path.write_bytes(content)
        with pytest.raises(SettingsError, match="not a whole safetensors file"):
            model_fingerprint(folder)


def test_ranks_hold_the_whole_model_together(make_model):
    """Guards a cut through the wrong dimension, or in the middle of a head: parts must join to what one rank reads."""
    made = make_model("qwen2", num_attention_heads=4, num_key_value_heads=2)
    config = ModelConfig.from_folder(made.folder)
    whole = load(made.folder, pack=False)
    for count in (2, 4):
        parts = [load(made.folder, pack=False, rank=Rank(index, count)) for index in range(count)]
        for number, layer in enumerate(whole.layers):
            of = [part.layers[number] for part in parts]
            x = torch.randn(3, config.hidden_size)
            split = [config.num_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
            query, key, value = layer.attention.qkv(x).split(split, -1)
            shapes = [each.shape.attention for each in of]
            own = [
                each.attention.qkv(x).split([s.num_heads * s.head_dim, *[s.num_kv_heads * s.head_dim] * 2], -1)
                for each, s in zip(of, shapes, strict=True)
            ]
            copies = count // config.num_kv_heads  # ranks that hold the same key head
            for joined, wanted in ((0, query), (1, key), (2, value)):
                step = 1 if joined == 0 else copies
                torch.testing.assert_close(torch.cat([each[joined] for each in own[::step]], -1), wanted)
            attended = torch.randn(3, config.num_heads * config.head_dim)
            sums = sum(each.attention.o(a) for each, a in zip(of, attended.chunk(count, -1), strict=True))
            torch.testing.assert_close(sums, layer.attention.o(attended))
            gated = [kernels.silu_and_mul(each.mlp.gate_up(x)) for each in of]
            torch.testing.assert_close(torch.cat(gated, -1), kernels.silu_and_mul(layer.mlp.gate_up(x)))
            summed = sum(each.mlp.down(g) for each, g in zip(of, gated, strict=True))
            torch.testing.assert_close(summed, layer.mlp.down(torch.cat(gated, -1)))
    with pytest.raises(SettingsError, match="to 3 ranks"):
        load(made.folder, rank=Rank(0, 3))


def test_ranks_of_a_dummy_model_hold_one_model(make_model):
    """Guards against ranks that draw numbers of their own, and a bias behind a sum that every rank adds."""
    folder = make_model("llama", attention_bias=True, mlp_bias=True).folder
    options = {"load_format": "dummy", "pack": False}
    whole, parts = load(folder, **options), [load(folder, **options, rank=Rank(index, 2)) for index in range(2)]
    down = torch.cat([part.layers[1].mlp.down.weight for part in parts], dim=1)
    assert torch.equal(down, whole.layers[1].mlp.down.weight)
    assert [part.layers[0].attention.o.bias is None for part in parts] == [False, True]
    assert [part.layers[0].mlp.down.bias is None for part in parts] == [False, True]
