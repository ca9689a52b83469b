"""Models that only transformers runs: over the paged pool they give its tokens, or they are refused.

A handful runs always; all of them with BATON_ALL_FAMILIES set, as once a week.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from baton.models.check import check
from baton.models.cpu.runner import ModelRunner
from baton.models.fallback import config as fallback_config
from baton.node.errors import SettingsError
from baton.tests.unit.models.fallback.families import (
    ALWAYS,
    OTHERS,
    REFUSED_ALWAYS,
    REFUSED_OTHERS,
    REFUSED_SHAPES,
    SMALL_MAMBA,
    make_folder,
    weekly,
)


@pytest.fixture
def make(tmp_path):
    """make(family, **config) saves a random model; gives its folder and transformers' own."""
    return lambda family, **config: (tmp_path, make_folder(tmp_path, family, **config))


def check_tokens(made, sequences, prompt):
    folder, reference = made
    check(folder, "auto", None)
    runner = ModelRunner.load(folder)
    assert runner.config.through.startswith("transformers ")
    ours, logits = sequences(runner, 1, 128).greedy(0, prompt, 60, chunk=20)
    with torch.inference_mode():
        theirs = reference(torch.tensor([prompt + ours]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    assert theirs.argmax(-1).tolist() == ours
    assert float((logits - theirs).abs().max() / theirs.abs().max()) <= 1e-4


@pytest.mark.parametrize("family", ALWAYS)
def test_tokens_equal_transformers(family, make, sequences, prompt):
    """Guards the paged pool behind an attention of the library: positions, scales, windows, logits of kept tokens."""
    check_tokens(make(family, **ALWAYS[family]), sequences, prompt)


@weekly
@pytest.mark.parametrize("family", OTHERS)
def test_tokens_of_other_families_equal_transformers(family, make, sequences, prompt):
    check_tokens(make(family, **OTHERS[family]), sequences, prompt)


@pytest.mark.parametrize("family", REFUSED_ALWAYS)
def test_state_outside_of_attention_is_refused(family, make):
    """Guards against wrong answers without an error: each of these runs, and gives other logits over the pool."""
    folder, _ = make(family, **REFUSED_SHAPES.get(family, {}))
    with pytest.raises(SettingsError, match=REFUSED_ALWAYS[family]):
        ModelRunner.load(folder)


def test_rounding_does_not_hide_state_outside_of_attention(make):
    """Guards the tolerance of a trial in bfloat16, which is that of the model's own rounding."""
    folder, _ = make("falcon_h1", **SMALL_MAMBA)
    with pytest.raises(SettingsError, match="in chunks gives other logits"):
        ModelRunner.load(folder, dtype="bfloat16")


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        LONGROPE | {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
    ],
)
def test_a_rope_that_follows_the_longest_sequence_is_refused(make, rope):
    """Guards against a long neighbour that changes a short sequence: no trial of short prompts sees it."""
    folder, _ = make("olmo2", rope_parameters=rope)
    with pytest.raises(SettingsError, match=f"its rope .{rope['rope_type']}. follows the longest sequence"):
        ModelRunner.load(folder)


@weekly
@pytest.mark.parametrize("family", REFUSED_OTHERS)
def test_other_families_are_refused(family, make):
    try:
        folder, _ = make(family, **REFUSED_SHAPES.get(family, {}))
    except Exception as error:
        pytest.skip(f"this version of transformers makes no such tiny model: {error}")
    with pytest.raises(SettingsError):
        ModelRunner.load(folder)


def test_code_of_a_folder_is_not_run(make):
    folder, _ = make("gpt2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoConfig": "evil.Config"}}))
    with pytest.raises(SettingsError, match="never run"):
        check(folder, "auto", None)


def test_without_the_library_an_error_says_how_to_get_it(make, monkeypatch):
    folder, _ = make("gpt2")

    def absent(name):
        raise fallback_config.PackageNotFoundError(name)

    monkeypatch.setattr(fallback_config, "version", absent)
    with pytest.raises(SettingsError, match=r"GPT2LMHeadModel is not supported.*baton-serve\[transformers\]"):
        check(folder, "auto", None)


def test_a_native_family_for_another_task_is_refused(make):
    """Guards against a classifier that is served as if it wrote text: the library makes a decoder of its folder."""
    folder, _ = make("qwen2")
    path = folder / "config.json"
    named = {"architectures": ["Qwen2ForSequenceClassification"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | named))
    with pytest.raises(SettingsError, match="Qwen2ForSequenceClassification is not supported; supported:"):
        check(folder, "auto", None)


def test_a_missing_tensor_is_named(make):
    """Guards against weights that the library draws at random where the files have none."""
    folder, model = make("gpt2")
    tensors = {
        name: each for name, each in model.state_dict().items() if "h.1.attn" not in name and name != "lm_head.weight"
    }
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(SettingsError, match=r"h\.1\.attn.* is missing"):
        ModelRunner.load(folder)


def test_quantisation_is_refused(make):
    folder, _ = make("gpt2")
    with pytest.raises(SettingsError, match="runs through transformers"):
        check(folder, "auto", None, "fp8")
