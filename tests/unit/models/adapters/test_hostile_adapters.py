"""Folders that hold no adapter of the model: one clear AdapterError each, which names the tensor or the field."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from baton.models.adapters.base_rows import rows_of_folder
from baton.models.adapters.peft import read_adapter
from baton.models.config import ModelConfig
from baton.node import adapter_folder
from baton.node.adapter_folder import WEIGHTS_NAME, config_of, read_facts
from baton.node.errors import AdapterError
from baton.tests.unit.models.conftest import LATENT, Made

DEMO = Path(__file__).resolve().parents[4] / "models" / "demo"
CONFIG = ModelConfig.from_folder(DEMO)
QUERY = "base_model.model.model.layers.0.self_attn.q_proj."
A, B = f"{QUERY}lora_A.weight", f"{QUERY}lora_B.weight"
HIDDEN = CONFIG.hidden_size


ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


def pair(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    return {A: torch.ones(8, HIDDEN), B: torch.ones(HIDDEN, 8), **changes}


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, **config}))
    save_file(tensors, folder / WEIGHTS_NAME)
    return folder


def error_of(folder: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder, CONFIG, rows_of_folder(DEMO, tied=True))
    return str(caught.value)


TENSORS = {
    "missing b": ({A: torch.ones(8, HIDDEN)}, "q_proj: has a lora_A without a lora_B"),
    "missing a": ({B: torch.ones(HIDDEN, 8)}, "q_proj: has a lora_B without a lora_A"),
    "swapped": ({A: torch.ones(HIDDEN, 8), B: torch.ones(8, HIDDEN)}, r"lora_A \[256, 8\]"),
    "other rank": ({A: torch.ones(4, HIDDEN), B: torch.ones(HIDDEN, 4)}, r"by the model and the configuration \[8, "),
    "unknown module": (
        pair(**{"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(8, HIDDEN)}),
        "layers.9.mlp.up_proj",
    ),
    "merged module of another family": ({A.replace("q_proj", "qkv_proj"): torch.ones(8, HIDDEN)}, "qkv_proj"),
    "whole norm": (
        pair(**{"base_model.model.model.norm.weight": torch.ones(HIDDEN + 1)}),
        r"model.norm.weight: is there twice, or not \[256\]",
    ),
    "whole product": (
        pair(**{"base_model.model.model.layers.0.mlp.down_proj.weight": torch.ones(HIDDEN, 768)}),
        r"down_proj.weight: is a whole weight \(modules_to_save\) of neither",
    ),
    "resized vocabulary": (
        pair(**{"base_model.model.lm_head.weight": torch.ones(CONFIG.vocab_size + 2, HIDDEN)}),
        rf"lm_head.weight: is \[{CONFIG.vocab_size + 2}, 256\], the model's own \[{CONFIG.vocab_size}, 256\]",
    ),
    "head twice": (
        {name: torch.ones(CONFIG.vocab_size, HIDDEN) for name in ("lm_head.weight", "base_model.model.lm_head.weight")},
        "lm_head.weight: is there twice",
    ),
    "own head and a pair": (
        {
            "lm_head.lora_A.weight": torch.ones(8, HIDDEN),
            "lm_head.lora_B.weight": torch.ones(CONFIG.vocab_size, 8),
            "lm_head.weight": torch.ones(CONFIG.vocab_size, HIDDEN),
        },
        "module lm_head: has a low-rank pair beside a whole weight",
    ),
    "own head that is not finite": (
        pair(**{"lm_head.weight": torch.full((CONFIG.vocab_size, HIDDEN), float("inf"))}),
        "lm_head.weight: has numbers that are not finite",
    ),
    "magnitude": (pair(**{f"{QUERY}lora_magnitude_vector": torch.ones(1)}), "has a magnitude, or has none"),
    "bias of b": (pair(**{f"{QUERY}lora_B.bias": torch.ones(1)}), "a bias of lora_B"),
    "rows of no tokens": (
        pair(**{ROWS: torch.ones(1, HIDDEN)}),
        "trainable_tokens_delta: rows of tokens that 'trainable_token_indices' does not name",
    ),
    "copy below rows of tokens": (
        pair(**{ROWS.replace("trainable_tokens_delta", "base_layer.weight"): torch.ones(CONFIG.vocab_size, HIDDEN)}),
        "token_adapter.base_layer.weight: is a whole weight",
    ),
    "nothing known": (pair(strange=torch.ones(1)), "tensor strange: is no part"),
    "not finite": (pair(**{B: torch.full((HIDDEN, 8), float("nan"))}), "not finite"),
    "whole numbers": (pair(**{B: torch.ones(HIDDEN, 8, dtype=torch.int8)}), "not a matrix of floats"),
    "no pair": ({}, "no pair of lora_A and lora_B"),
    "twice": (pair(**{A.removeprefix("base_model.model."): torch.ones(8, HIDDEN)}), "is there twice"),
    "another embedding": (
        pair(**{"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(CONFIG.vocab_size, HIDDEN)}),
        "embed_tokens.base_layer.weight: differs from the model's own",
    ),
    "embedding of another size": (
        pair(**{"base_model.model.model.embed_tokens.base_layer.weight": torch.zeros(9, HIDDEN)}),
        r"is \[9, 256\], the model's own",
    ),
    "embedding saved as a product": (
        pair(**{"base_model.model.model.embed_tokens.lora_A.weight": torch.zeros(8, HIDDEN)}),
        "is not what PEFT saves",
    ),
}
FIELDS = {
    "another method": ({"peft_type": "IA3"}, "'peft_type' must be"),
    "biases": ({"bias": "all"}, "'bias' must be"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_16"}, "'init_lora_weights' must be"),
    "transposed": ({"fan_in_fan_out": True}, "'fan_in_fan_out' is not supported"),
    "activated by tokens": ({"alora_invocation_tokens": [1]}, "'alora_invocation_tokens' is not supported"),
    "a field of the future": ({"use_magic": "yes"}, "'use_magic' is not supported"),
    "huge rank": ({"r": 1 << 31}, "'r' must be of whole numbers"),
    "rank that is no number": ({"rank_pattern": {"q_proj": "8"}}, "'rank_pattern' must be"),
    "endless alpha": ({"lora_alpha": float("inf")}, "'lora_alpha' must be"),
    "slow pattern": ({"alpha_pattern": {"(a+)+b": 1}}, "no pattern of module names"),
    "a parameter that is no weight": (
        {"target_parameters": ["mlp.experts.down_proj", "mlp.gate.weight", "mlp.router.bias"]},
        r"'target_parameters' must be names that end in gate_up_proj, down_proj or \.weight",
    ),
    "all weights": ({"target_parameters": ["weight"]}, "'target_parameters' must be"),
    "parameters that are no list": ({"target_parameters": {"mlp.gate.weight": 1}}, "'target_parameters' must be"),
    "a parameter that is no name": ({"target_parameters": [["mlp.gate.weight"]]}, "'target_parameters' must be"),
    "pattern that is none behind a name's start": ({"rank_pattern": {"(?i)q_proj": 4}}, "no pattern of module names"),
    "tokens twice": ({"trainable_token_indices": [3, 3]}, "'trainable_token_indices' must be lists of 1 to 4096"),
    "no tokens": ({"trainable_token_indices": {"embed_tokens": []}}, "'trainable_token_indices' must be lists"),
    "tokens that are no numbers": ({"trainable_token_indices": [True, -1]}, "'trainable_token_indices' must be lists"),
    "two modules of a name": (
        {"trainable_token_indices": {"embed_tokens": [1], "model.embed_tokens": [2]}},
        "'trainable_token_indices' must be of modules with different names",
    ),
    "broken pattern": ({"alpha_pattern": {"(": 1}}, "no pattern of module names"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_wrong_tensors_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Guards against an adapter of which a part is left out in silence."""
    tensors, expected = TENSORS[name]
    folder = write(tmp_path, tensors)
    with pytest.raises(AdapterError, match=expected):
        read_adapter(folder, CONFIG, rows_of_folder(DEMO, tied=True))


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        ("mixtral", "block_sparse_moe.experts.2.w2", "names no projection of a routed expert"),
        ("mixtral", "block_sparse_moe.router", "this model has no module"),
        ("mixtral", "mlp.shared_expert_gate", "this model has no module"),
        ("gpt_oss", "mlp.gate", "this model has no module"),
        ("qwen2_moe", "mlp.experts.1.w1", "names no projection of a routed expert"),
        ("gpt_oss", "mlp.experts.1.gate_proj", "names no projection of a routed expert"),
        ("qwen2_moe", "mlp.experts.base_layer.base_layer", "names no projection of a routed expert"),
        ("qwen2_moe", "mlp.gate.base_layer", "this model has no module"),
        ("deepseek_v3", "mlp.gate", "this model has no module"),
        ("qwen2_moe", "mlp.up_proj", "this model has no module"),
        ("mixtral", "self_attn.kv_b_proj", "this model has no module"),
        ("deepseek_v2", "self_attn.q_proj", "this model has no module"),
    ],
)
def test_modules_that_are_not_adapted_are_refused_by_name(
    family: str, module: str, expected: str, make_model: Callable[..., Made], tmp_path: Path
) -> None:
    """Guards against experts and routers without what an adapter adds to them: by names of files, and of PEFT. The
    only layer of deepseek_v3 is dense."""
    few = {"num_hidden_layers": 1, "num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "n_group": 1}
    config = ModelConfig.from_folder(make_model(family, **LATENT | few).folder)
    name = f"base_model.model.model.layers.0.{module}.lora_A.weight"
    with pytest.raises(AdapterError, match=f"tensor {name}: {expected}"):
        read_adapter(write(tmp_path, {name: torch.ones(8, HIDDEN)}), config)


EXPERTS = "base_model.model.model.layers.0.mlp.experts."


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"": (16, 48, 96)}, r"module model.layers.0.mlp.experts: a pair from 48 inputs to 96 outputs .* fits no"),
        ({"": (12, 48, 160)}, r"experts.gate_up_proj: lora_A \[12, 48\] and lora_B \[160, 12\].* \[16, 48\]"),
        ({"": (16, 80, 48), "base_layer.": (16, 80, 48)}, "experts.base_layer: a pair .* is there twice"),
        ({"": (16, 80, 48), "1.down_proj.": (8, 80, 48)}, "pairs of their own beside one for all"),
        ({"1.down_proj.": (4, 80, 48)}, r"experts.1.down_proj: lora_A \[4, 80\]"),
    ],
)
def test_pairs_of_experts_of_other_shapes_are_refused(
    tensors: dict[str, tuple[int, int, int]], expected: str, make_model: Callable[..., Made], tmp_path: Path
) -> None:
    """Guards against numbers of one expert at another: the names of parameters say less than those of modules."""
    config = ModelConfig.from_folder(
        make_model(
            "qwen3_moe", num_hidden_layers=1, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=80
        ).folder
    )
    written = {}
    for name, (ranks, inputs, outputs) in tensors.items():
        written[f"{EXPERTS}{name}lora_A.weight"] = torch.ones(ranks, inputs)
        written[f"{EXPERTS}{name}lora_B.weight"] = torch.ones(outputs, ranks)
    with pytest.raises(AdapterError, match=expected):
        read_adapter(write(tmp_path, written), config)


@pytest.mark.parametrize(
    ("tokens", "tensors", "expected"),
    [
        ([1, 2], pair(), "'trainable_token_indices' has tokens of embed_tokens, and no tensor has rows"),
        ([1, 2], pair(**{ROWS: torch.ones(3, HIDDEN)}), r"is \[3, 256\], by the model .* \[2, 256\], of tokens below"),
        ([4096], pair(**{ROWS: torch.ones(1, HIDDEN)}), "of tokens below 4096"),
        ([1], pair(**{ROWS: torch.full((1, HIDDEN), float("nan"))}), "tokens_delta: has numbers that are not finite"),
        ({"lm_head": [1]}, {ROWS.replace("model.embed_tokens", "lm_head"): torch.ones(1, HIDDEN)}, "does not name"),
        (
            [1],
            {ROWS: torch.ones(1, HIDDEN), "model.embed_tokens.weight": torch.ones(CONFIG.vocab_size, HIDDEN)},
            "model.embed_tokens: has a low-rank pair or a whole weight beside rows of tokens",
        ),
    ],
)
def test_rows_of_tokens_that_do_not_fit_are_refused(
    tokens: object, tensors: dict[str, torch.Tensor], expected: str, tmp_path: Path
) -> None:
    """Guards against rows in the place of other tokens. The head of this model is its embedding."""
    assert re.search(expected, error_of(write(tmp_path, tensors, trainable_token_indices=tokens)))


ROUTER = "base_model.model.model.layers.0.mlp.gate.lora_"
OLD_ROUTER = "base_model.model.model.layers.0.block_sparse_moe.gate.lora_"


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({f"{ROUTER}A": (8, 48)}, "module model.layers.0.mlp.gate: has a lora_A without a lora_B"),
        ({f"{OLD_ROUTER}B": (2, 8)}, "module model.layers.0.block_sparse_moe.gate: has a lora_B without a lora_A"),
        (
            {f"{ROUTER}A": (8, 48), f"{ROUTER}B": (3, 8)},
            r"mlp.gate: lora_A \[8, 48\] and lora_B \[3, 8\].* and \[2, 8\]",
        ),
        (
            {f"{ROUTER}A": (8, 48), f"{ROUTER}B": (2, 8), f"{OLD_ROUTER}A": (8, 48), f"{OLD_ROUTER}B": (2, 8)},
            "mlp.gate: is there twice, under two names",
        ),
        ({f"{ROUTER}A": (8, 48), f"{ROUTER}B": (2, 8), f"{ROUTER}magnitude_vector": (2,)}, "has a magnitude"),
        ({ROUTER.removesuffix(".lora_"): (2, 48)}, r"mlp.gate.weight: is a whole weight \(modules_to_save\)"),
    ],
)
def test_pairs_of_routers_that_do_not_fit_are_refused(
    tensors: dict[str, tuple[int, ...]], expected: str, make_model: Callable[..., Made], tmp_path: Path
) -> None:
    """Guards against a router of which a part is left out, or one of two pairs."""
    few = {"num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = ModelConfig.from_folder(make_model("mixtral", **few).folder)
    written = {f"{name}.weight": torch.ones(shape) for name, shape in tensors.items()}
    with pytest.raises(AdapterError, match=expected):
        read_adapter(write(tmp_path, written), config)


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_fields_are_refused_by_name(name: str, tmp_path: Path) -> None:
    fields, expected = FIELDS[name]
    with pytest.raises(AdapterError, match=expected):
        read_facts(write(tmp_path, pair(), **fields))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_times_modules_are_bounded(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against a folder that is searched for minutes, and against another than the first pattern that matches."""
    few = {name: name for name in (f"layers.{number}.q_proj" for number in range(10))}
    patterns = {f"layers.{number}.q_proj": 2 for number in (3, 8)} | {r".*\.(3|9)\.q_proj": 4}
    config = config_of({"peft_type": "LORA", "r": 8, "lora_alpha": 8, field: patterns}, "x")
    monkeypatch.setattr(adapter_folder, "MAX_COMPARISONS", 30)
    ranks = config.ranks_of(few)
    found = ranks if field == "rank_pattern" else config.scalings_of(few, ranks)
    one, two, four = (8, 2, 4) if field == "rank_pattern" else (1, 0.25, 0.5)
    assert list(found.values()) == [one, one, one, two, one, one, one, one, two, four]
    with pytest.raises(AdapterError, match=f"'{field}': 3 patterns times 11 modules are more than 30 comparisons"):
        more = few | {"another": "layers.10.q_proj"}
        config.scalings_of(more, config.ranks_of(more))


@pytest.mark.parametrize("changed", [False, True])
def test_a_copy_of_the_models_own_embedding_is_dropped(changed: bool, tmp_path: Path) -> None:
    """PEFT saves one without need; one that differs in a single row is another."""
    own = rows_of_folder(DEMO, tied=True)("model.embed_tokens.weight", None)
    assert own is not None
    own[1, 0] += changed
    folder = write(tmp_path, pair(**{"base_model.model.model.embed_tokens.weight": own}))
    read = read_adapter(folder, CONFIG, rows_of_folder(DEMO, tied=True))
    assert [each.shape for each in read.wholes] == ([own.shape] if changed else [])


def test_pickles_are_refused(tmp_path: Path) -> None:
    write(tmp_path, pair())
    (tmp_path / WEIGHTS_NAME).rename(tmp_path / "adapter_model.bin")
    assert "pickle" in error_of(tmp_path)


def test_files_that_are_cut_off_or_lie_about_their_header_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path, pair()) / WEIGHTS_NAME
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:4], b"", struct.pack("<Q", 1 << 40) + whole[8:], b"\x00" * 64):
        path.write_bytes(data)
        assert "not a whole safetensors file" in error_of(tmp_path)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    """Guards against an exception that the worker's thread does not expect."""
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), pair())
        (folder / WEIGHTS_NAME).write_bytes(data)
        error_of(folder)


def test_an_adapter_is_its_content(tmp_path: Path) -> None:
    """Two copies are one adapter; other numbers, or the same scaled otherwise, are another."""
    folders = [tmp_path / name for name in "abcd"]
    for folder in folders:
        folder.mkdir()
    write(folders[0], pair(), base_model_name_or_path="here")
    write(folders[1], pair(), base_model_name_or_path="there")
    write(folders[2], pair(), lora_alpha=16)
    write(folders[3], pair(**{A: torch.zeros(8, HIDDEN)}))
    facts = [read_facts(folder) for folder in folders]
    assert len({each.digest for each in facts}) == 3
    assert facts[0].digest == facts[1].digest == read_adapter(folders[0], CONFIG).digest
    assert facts[0].rank == 8


def test_which_tokens_have_rows_is_content(tmp_path: Path) -> None:
    """Guards against KV of an adapter for another one with the same rows, and ranks that slots have no room for."""
    facts = []
    for tokens in ([], [*range(9)], [*range(1, 10)], {"embed_tokens": [*range(9)]}):
        facts.append(read_facts(write(tmp_path, pair(), trainable_token_indices=tokens)))
    assert len({each.digest for each in facts}) == 3 and facts[1].digest == facts[3].digest
    assert [each.rank for each in facts] == [8, 9, 9, 9]


def test_what_patterns_name_is_content(tmp_path: Path) -> None:
    """Guards against KV of an adapter for another one, whose pattern means no module."""
    weights, patterns = {"target_parameters": ["self_attn.q_proj.weight"]}, {"alpha_pattern": {"q_proj": 16}}
    found = []
    for number, fields in enumerate([{}, weights, patterns, weights | patterns]):
        folder = tmp_path / str(number)
        folder.mkdir()
        read = read_adapter(write(folder, pair(), **fields), CONFIG)
        found.append((read.digest, float(read.layers[0].qkv[0].b[0, 0])))
    assert found[0] == found[1] and found[0][1] == found[3][1] == found[2][1] / 2
    assert len({digest for digest, _ in found}) == 3
