"""Which file of a model folder wins, in a table against transformers, whose rules they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from baton.node.errors import SettingsError
from baton.proxy.text.model_files import read_model_files
from baton.proxy.text.model_text import ModelText

END: dict[str, Any] = {
    "content": "<|end|>",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}
PLAIN = END | {"special": False}
MARKED = END | {"__type": "AddedToken"}
SAMPLES = ("a<|end|>b", "<|bos|>a <|end|> <|x|>", "<|y|><|y|>a", "")

Files = dict[str, Any]
FOLDERS: dict[str, tuple[list[AddedToken], Files]] = {
    "only tokenizer.json": ([AddedToken("<|end|>", special=True)], {}),
    "added_tokens_decoder": ([], {"tokenizer_config.json": {"added_tokens_decoder": {"256": END}}}),
    "added_tokens_decoder, not in order": (
        [],
        {"tokenizer_config.json": {"added_tokens_decoder": {"300": END, "299": END | {"content": "<|x|>"}}}},
    ),
    "added_tokens_decoder makes special": (
        [AddedToken("<|end|>", special=False, normalized=False)],
        {"tokenizer_config.json": {"added_tokens_decoder": {"256": END}}},
    ),
    "added_tokens_decoder makes plain": (
        [AddedToken("<|end|>", special=True)],
        {"tokenizer_config.json": {"added_tokens_decoder": {"256": PLAIN}}},
    ),
    "added_tokens_decoder, named": (
        [],
        {"tokenizer_config.json": {"added_tokens_decoder": {"256": PLAIN}, "eos_token": "<|end|>"}},
    ),
    "added_tokens_decoder shuts the older files": (
        [],
        {
            "tokenizer_config.json": {"added_tokens_decoder": {"256": END}, "eos_token": "<|end|>"},
            "special_tokens_map.json": {"eos_token": "<|x|>", "bos_token": "<|bos|>"},
            "added_tokens.json": {"<|y|>": 257},
        },
    ),
    "additional_special_tokens": ([], {"tokenizer_config.json": {"additional_special_tokens": ["<|end|>", "<|x|>"]}}),
    "extra_special_tokens": (
        [],
        {"tokenizer_config.json": {"extra_special_tokens": ["<|x|>"], "additional_special_tokens": ["<|end|>"]}},
    ),
    "extra_special_tokens, marked": ([], {"tokenizer_config.json": {"extra_special_tokens": [MARKED]}}),
    "extra_special_tokens, an object": (
        [],
        {"tokenizer_config.json": {"extra_special_tokens": {"y_token": "<|y|>"}, "x_token": "<|x|>"}},
    ),
    "names in another order than ids": (
        [],
        {"tokenizer_config.json": {"pad_token": "<|x|>", "eos_token": "<|end|>", "bos_token": "<|bos|>"}},
    ),
    "a name that is an ordinary token": ([], {"tokenizer_config.json": {"eos_token": "a"}}),
    "a name, marked": ([], {"tokenizer_config.json": {"eos_token": MARKED | {"rstrip": True}}}),
    "special_tokens_map": (
        [AddedToken("<|bos|>", special=True), AddedToken("<|end|>", special=True)],
        {"special_tokens_map.json": {"bos_token": "<|bos|>", "eos_token": END}},
    ),
    "special_tokens_map wins": (
        [],
        {
            "tokenizer_config.json": {"eos_token": "<|x|>", "bos_token": "<|bos|>"},
            "special_tokens_map.json": {"eos_token": {"content": "<|end|>", "lstrip": True}},
        },
    ),
    "special_tokens_map, further ones": (
        [],
        {
            "tokenizer_config.json": {"extra_special_tokens": ["<|x|>"]},
            "special_tokens_map.json": {"extra_special_tokens": ["<|x|>", "<|end|>"], "z_token": "<|y|>"},
        },
    ),
    "special_tokens_map, older further ones": (
        [],
        {"special_tokens_map.json": {"additional_special_tokens": ["<|x|>", "<|end|>"]}},
    ),
    "special_tokens_map, a name that is none": (
        [],
        {"tokenizer_config.json": {"eos_token": "<|x|>"}, "special_tokens_map.json": {"eos_token": None}},
    ),
    "special_tokens_map, an object": (
        [],
        {
            "tokenizer_config.json": {"extra_special_tokens": ["<|end|>"], "x_token": "<|x|>"},
            "special_tokens_map.json": {"extra_special_tokens": {"y_token": "<|y|>"}, "pad_token": "<|bos|>"},
        },
    ),
    "added_tokens.json": ([], {"added_tokens.json": {"<|x|>": 257, "<|end|>": 256}}),
    "added_tokens.json, named": (
        [],
        {"added_tokens.json": {"<|x|>": 257, "<|end|>": 256}, "tokenizer_config.json": {"eos_token": "<|end|>"}},
    ),
    "added_tokens.json, in tokenizer.json too": (
        [AddedToken("<|end|>", special=True)],
        {"added_tokens.json": {"<|end|>": 256, "<|x|>": 257}},
    ),
    "split_special_tokens": (
        [AddedToken("<|end|>", special=True)],
        {"tokenizer_config.json": {"split_special_tokens": True}},
    ),
    "add_bos_token": (
        [AddedToken("<|bos|>", special=True)],
        {"tokenizer_config.json": {"add_bos_token": True, "add_eos_token": True, "bos_token": "<|bos|>"}},
    ),
    "template, a text": ([], {"tokenizer_config.json": {"chat_template": "text"}}),
    "template, a list": (
        [],
        {
            "tokenizer_config.json": {
                "chat_template": [{"name": "default", "template": "a"}, {"name": "t", "template": "b"}]
            }
        },
    ),
    "template, one for tools": (
        [],
        {"tokenizer_config.json": {"chat_template": {"tool_use": "tools", "default": "a"}}},
    ),
    "template, a file for tools": (
        [],
        {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "tools"},
    ),
    "template, an object": ([], {"tokenizer_config.json": {"chat_template": {"t": "b", "default": "a"}}}),
    "template, a file": (
        [],
        {"chat_template.jinja": "file", "tokenizer_config.json": {"chat_template": "text"}},
    ),
    "template, files": (
        [],
        {"chat_template.jinja": "file", "additional_chat_templates/tools.jinja": "tools"},
    ),
    "template, a default among files": (
        [],
        {"chat_template.jinja": "file", "additional_chat_templates/default.jinja": "other"},
    ),
}


def write_folder(folder: Path, added: list[AddedToken], files: Files) -> Path:
    """A byte-level tokenizer of 256 tokens, `added`, and `files`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: rank for rank, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_has_the_tokens_and_the_template_that_transformers_gives_it(tmp_path: Path, name: str) -> None:
    """Guards against a special token spelt as letters, an end missed, or a first token that the model never saw."""
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path, *FOLDERS[name])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    files, text = read_model_files(folder), ModelText(folder)
    assert {token: repr(added) for token, added in theirs.added_tokens_decoder.items()} == {
        token: repr(added) for token, added in files.tokenizer.get_added_tokens_decoder().items()
    }
    assert files.special_tokens == {key: str(value) for key, value in theirs.special_tokens_map.items()}
    assert files.template == (theirs.get_chat_template() if theirs.chat_template else "")
    assert files.tools_template in ("", theirs.get_chat_template(tools=[{}]) if theirs.chat_template else "")
    assert bool(files.tools_template) == ("for tools" in name)
    for sample in SAMPLES:
        for special in (False, True):
            assert text.encode(sample, add_special_tokens=special) == tuple(
                theirs(sample, add_special_tokens=special)["input_ids"]
            )
    ids = text.encode("".join(SAMPLES), add_special_tokens=False)
    assert text.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        ({"eos_token_id": 7}, None),
        ({"eos_token_id": [7, 8]}, None),
        ({"eos_token_id": 7}, {"eos_token_id": [5]}),
        ({"eos_token_id": 7}, {"eos_token_id": 5}),
        ({}, {"eos_token_id": [5, 6]}),
    ],
)
def test_a_folder_has_the_end_tokens_that_transformers_generates_with(
    tmp_path: Path, config: Files, generation: Files | None
) -> None:
    """Guards against an answer cut at an end token of config.json that generation_config.json has corrected."""
    transformers = pytest.importorskip("transformers")
    folder = write_folder(tmp_path, [], {"config.json": {"model_type": "llama", "vocab_size": 256} | config})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
        theirs = transformers.GenerationConfig.from_pretrained(folder)
    else:
        made = transformers.AutoConfig.from_pretrained(folder)
        theirs = transformers.GenerationConfig.from_model_config(made)
    expected = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert ModelText(folder).eos_ids == tuple(expected)


def test_the_tokenizers_end_token_always_counts(tmp_path: Path) -> None:
    """Guards against chats of a fine-tuned model that run on: its chats end otherwise than its base's texts."""
    files = {"special_tokens_map.json": {"eos_token": "<|end|>"}, "generation_config.json": {"eos_token_id": 5}}
    assert ModelText(write_folder(tmp_path, [AddedToken("<|end|>", special=True)], files)).eos_ids == (5, 256)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": END}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"256": 7}}),
        ("tokenizer_config.json", {"eos_token": 7}),
        ("tokenizer_config.json", {"extra_special_tokens": "<|x|>"}),
        ("tokenizer_config.json", {"extra_special_tokens": [7]}),
        ("special_tokens_map.json", {"eos_token": [7]}),
        ("special_tokens_map.json", {"additional_special_tokens": 7}),
        ("added_tokens.json", {"<|x|>": "one"}),
        ("added_tokens.json", {"<|x|>": True}),
        ("added_tokens.json", ["<|x|>"]),
    ],
    ids=str,
)
def test_a_file_of_another_shape_is_a_settings_error(tmp_path: Path, name: str, content: object) -> None:
    """Guards against a traceback at the start, and a token that is silently left out."""
    with pytest.raises(SettingsError):
        read_model_files(write_folder(tmp_path, [], {name: content}))


def test_a_folder_of_a_model_that_sees_images(tmp_path: Path) -> None:
    """Guards against an answer that never ends, ids that the table lacks, and a chat that is refused: keys of the
    decoder are nested, and older folders have the template in the processor's file."""
    text = {"model_type": "mistral", "vocab_size": 300, "eos_token_id": 9}
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text, "vision_config": {}}
    template = {"chat_template": "{{ messages[0].content }}"}
    files = read_model_files(write_folder(tmp_path, [], {"config.json": config, "chat_template.json": template}))
    assert (files.table_size, files.eos_ids, files.template) == (300, (9,), "{{ messages[0].content }}")
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [7, 8]}))
    assert read_model_files(tmp_path).eos_ids == (7, 8)


def test_a_tokenizer_in_another_format_is_named(tmp_path: Path) -> None:
    """Guards a user of an old folder, or one in Mistral's format, from not knowing what to do."""
    for name, hint in (
        ("", "is needed$"),
        ("vocab.json", "of vocab.json .*save_pretrained"),
        ("tekken.json", "tekken"),
    ):
        if name:
            (tmp_path / name).write_text("{}")
        with pytest.raises(SettingsError, match=hint):
            read_model_files(tmp_path)
