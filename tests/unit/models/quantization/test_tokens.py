"""Models of every format of quantised weights, against transformers on the numbers that these weights mean."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from baton.models.batch import Row
from baton.models.config import ModelConfig
from baton.models.cpu.runner import ModelRunner
from baton.models.partition import Rank
from baton.models.weights import load_weights
from baton.tests.unit.models.quantization.writers import FORMATS

SIZES = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
WIDE = {"vocab_size": 160, "hidden_size": 192, "intermediate_size": 144, "num_hidden_layers": 1}
NUM_PROMPTS, PROMPT, NEW = 50, 11, 6


def quantise(made, form, shards=2):
    """Rewrites the folder of a model in a format, and gives the reference the weights that it then means.

    Neighbouring tensors go to different files: no module lies in one.
    """
    reference = made.reference
    tied = reference.config.tie_word_embeddings
    heads = {"model.embed_tokens"} if tied else {"lm_head"}
    tensors = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    if tied:
        tensors.pop("lm_head.weight")
    for name in [name for name, tensor in tensors.items() if tensor.ndim == 2 and name.endswith(".weight")]:
        module = name.removesuffix(".weight")
        if "_proj" in module or (form.head and module in heads):
            written, meaning = form.write(tensors.pop(name).numpy())
            tensors |= {f"{module}.{role}": tensor for role, tensor in written.items()}
            reference.get_submodule(module).weight.data = torch.from_numpy(np.ascontiguousarray(meaning))
    save(made.folder, tensors, shards)
    config = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps(config | {"quantization_config": form.config}))
    return tensors


def save(folder, tensors, shards=1):
    (folder / "model.safetensors").unlink(missing_ok=True)
    if shards == 1:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
        return
    files = {name: f"model-{index % shards}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        safetensors.torch.save_file({n: t.contiguous() for n, t in tensors.items() if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


@pytest.mark.parametrize("name", FORMATS)
def test_tokens_of_50_prompts_equal_transformers_on_what_the_weights_mean(name, make_model, sequences, caplog):
    """Guards every format against weights that are read otherwise than they were written, in every projection, in
    merged ones, and with tensors of a module in several files."""
    sizes = WIDE if "128" in name or name == "modelopt, blocks" else SIZES
    made = make_model("llama", tie_word_embeddings=name == "int-quantized", **sizes)
    quantise(made, FORMATS[name])
    prompts = torch.randint(0, 160, (NUM_PROMPTS, PROMPT), generator=torch.Generator().manual_seed(3))
    runner = ModelRunner.load(made.folder)
    assert "tensors_unused" not in caplog.text and "head_not_tied" not in caplog.text
    known, logits = greedy(sequences(runner, NUM_PROMPTS, PROMPT + NEW), prompts)
    with torch.inference_mode():
        theirs = made.reference(known).logits[:, PROMPT - 1 : -1]
    assert torch.equal(theirs.argmax(-1), known[:, PROMPT:])
    assert float((logits - theirs).abs().max() / theirs.abs().max()) <= 1e-4
    assert len(known[:, PROMPT:].unique()) > 20, "a model that repeats itself shows nothing"


def greedy(held, prompts):
    """All prompts at once: tokens [prompts, PROMPT + NEW], logits [prompts, NEW, vocab]."""
    (draw,) = {row.draw for row in held.chunks(0, [0], 1)}
    known, logits = prompts.tolist(), []
    for step in range(NEW):
        rows = [
            Row(tokens[PROMPT + step - 1 :], PROMPT + step - 1, table, draw) if step else Row(tokens, 0, table, draw)
            for tokens, table in zip(known, held.tables, strict=True)
        ]
        logits.append(held.runner.compute(rows)[1])
        known = [[*tokens, int(token)] for tokens, token in zip(known, logits[-1].argmax(-1), strict=True)]
    return torch.tensor(known), torch.stack(logits, 1)


@pytest.mark.parametrize(
    "name", ["fp8, blocks that do not divide", "gptq, desc_act", "awq", "pack-quantized, actorder"]
)
def test_ranks_hold_what_one_rank_holds(name, make_model):
    """Guards a cut through groups and blocks of scales: a rank's inputs of the down projection begin inside one."""
    made = make_model("llama", **SIZES)
    quantise(made, FORMATS[name])
    config = ModelConfig.from_folder(made.folder)

    def load(rank):
        return load_weights(config, made.folder, torch.float32, pack=False, rank=rank).layers[1]

    whole, parts = load(Rank()), [load(Rank(index, 2)) for index in range(2)]
    assert torch.equal(torch.cat([part.mlp.down.weight for part in parts], 1), whole.mlp.down.weight)
    assert torch.equal(torch.cat([part.attention.o.weight for part in parts], 1), whole.attention.o.weight)
    gate_up = [part.mlp.gate_up.weight.chunk(2) for part in parts]
    joined = torch.cat([*(each[0] for each in gate_up), *(each[1] for each in gate_up)])
    assert torch.equal(joined, whole.mlp.gate_up.weight)


def test_bfloat16_rounds_once(make_model):
    """Guards against scales or products that are rounded on the way to the type of the run."""
    made = make_model("llama", **SIZES)
    quantise(made, FORMATS["gptq, zero points"])
    config = ModelConfig.from_folder(made.folder)
    exact, run = (load_weights(config, made.folder, dtype, pack=False) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(run.layers[0].mlp.down.weight, exact.layers[0].mlp.down.weight.to(torch.bfloat16))


def test_own_quantised_head_of_a_folder_that_says_tied_is_used(make_model, caplog):
    """Guards against the embedding in place of a head that was quantised by itself."""
    made = make_model("llama", **SIZES)
    tensors = quantise(made, FORMATS["gptq, desc_act"])
    config = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    weights = load_weights(ModelConfig.from_folder(made.folder), made.folder, torch.float32, pack=False)
    assert "lm_head.qweight" in tensors and "head_not_tied" in caplog.text
    assert torch.equal(weights.lm_head.weight, made.reference.lm_head.weight)
