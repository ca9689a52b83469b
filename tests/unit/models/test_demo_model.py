"""The demo model that ships: its folder is whole and small, and its weights write English and stop by themselves."""

import json
import re
from pathlib import Path

import jinja2.sandbox
import pytest
from tokenizers import Tokenizer

FOLDER = Path(__file__).parents[3] / "models" / "demo"


def read(name: str) -> dict:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def render(messages: list[dict], add_generation_prompt: bool, **variables: object) -> str:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = json.dumps
    template = environment.from_string(read("tokenizer_config.json")["chat_template"])
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)


def test_folder_is_whole_and_small() -> None:
    """Guards against a file that was left out, and against weights too large for a repository."""
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in FOLDER.iterdir()} == names | {"README.md"}
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 16_000_000


def test_config_and_tokenizer_agree(tokenizer: Tokenizer) -> None:
    """Guards against end ids that name other tokens than the ones that were trained to end a text or a turn."""
    config = read("config.json")
    assert config["vocab_size"] == tokenizer.get_vocab_size()
    assert [tokenizer.id_to_token(i) for i in config["eos_token_id"]] == ["<|end|>", "<|endoftext|>"]
    assert read("generation_config.json")["eos_token_id"] == config["eos_token_id"]
    assert read("tokenizer_config.json")["eos_token"] == "<|end|>"


@pytest.mark.parametrize("text", ["Once upon a time", "  two\n\nlines\t", "naïve “quotes” 你好 😀", "12,345"])
def test_tokenizer_keeps_every_byte(tokenizer: Tokenizer, text: str) -> None:
    """Guards against a normaliser or a prefix space: what is encoded decodes to itself, and nothing is added."""
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_renders_the_trained_form(tokenizer: Tokenizer) -> None:
    """Guards against a template that drifts from the form of the training data."""
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi "}]
    text = render(messages, add_generation_prompt=True)
    assert text == "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n"
    messages.append({"role": "assistant", "content": "Hello!"})
    assert render(messages, add_generation_prompt=False) == text + "Hello!<|end|>\n"
    special = {"<|system|>", "<|user|>", "<|assistant|>", "<|end|>"}
    assert [token for token in tokenizer.encode(text).tokens if token in special] == [
        *["<|system|>", "<|end|>"],
        *["<|user|>", "<|end|>"],
        "<|assistant|>",
    ]


def test_markers_are_tokens_in_the_places_of_impossible_bytes(tokenizer: Tokenizer) -> None:
    """Guards against markers that take a token from the texts that the model was trained on."""
    markers = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    assert [tokenizer.encode(marker).ids for marker in markers] == [[token_id] for token_id in range(182, 188)]
    assert tokenizer.decode(tokenizer.encode("".join(markers)).ids) == "".join(markers)
    for first in (0xC3, 0xF4):  # the first bytes of a letter's and of the last characters' UTF-8
        text = bytes([first, *[0x8F, 0x80, 0x80][: 3 if first == 0xF4 else 1]]).decode()
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template_has_tools() -> None:
    """Guards against tools, calls and results that the prompt loses, and a second system turn."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    function = {"name": "f", "arguments": {"a": "ä"}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look.", "tool_calls": [{"type": "function", "function": function}] * 2},
        {"role": "tool", "tool_call_id": "call_1", "content": "4"},
    ]
    text = render(messages, add_generation_prompt=True, tools=[tool])
    assert text.startswith("<|system|>\nBe kind.\n\n") and text.count("<|system|>") == 1
    assert f"<tools>\n{json.dumps(tool)}\n</tools>" in text
    call = f"<tool_call>\n{json.dumps(function)}\n</tool_call>"
    assert text.endswith(
        f"<|user|>\nHi<|end|>\n<|assistant|>\nI look.\n{call}\n{call}<|end|>\n"
        "<|user|>\n<tool_response>\n4\n</tool_response><|end|>\n<|assistant|>\n"
    )
    alone = render([{**messages[2], "content": None}], add_generation_prompt=False)
    assert alone == f"<|assistant|>\n{call}\n{call}<|end|>\n"
    assert "<tools>" not in render(messages, add_generation_prompt=True)


def test_chat_template_has_a_switch_for_reasoning() -> None:
    """Guards against reasoning that begins by itself, and reasoning of earlier turns that fills the context."""
    question = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "b", "reasoning_content": "a"}
    plain = "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert render([question], True) == plain
    assert render([question], True, enable_thinking=True) == plain + "<think>\n"
    assert render([question], True, enable_thinking=False) == plain + "<think>\n\n</think>\n\n"
    assert render([question, answer], False) == plain + "<think>\na\n</think>\n\nb<|end|>\n"
    assert render([question, answer, question], True) == plain + "b<|end|>\n" + plain


@pytest.mark.parametrize("prompt", ["Once upon a time", "One day, a little fox", "Tell me a story about a dog."])
def test_writes_english_and_stops(tokenizer: Tokenizer, prompt: str) -> None:
    """Guards against broken or untrained weights: they neither end a text nor write words, and they run in circles."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    chat = prompt.startswith("Tell")
    text = render([{"role": "user", "content": prompt}], add_generation_prompt=True) if chat else prompt
    ids = torch.tensor([tokenizer.encode(text).ids])
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "pad_token_id": 0}
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=400, **greedy)[0, ids.shape[1] :]
    assert tokenizer.id_to_token(int(new[-1])) == ("<|end|>" if chat else "<|endoftext|>")
    words = re.findall(r"[A-Za-z]+", tokenizer.decode(new.tolist()))
    # A vocabulary of 4,096 that was trained on English holds the frequent words whole: it is our dictionary.
    known = [word for word in words if tokenizer.token_to_id(f"Ġ{word}") is not None]
    assert len(words) > 40
    assert len(known) > 0.8 * len(words)
    assert len(set(words)) > 0.25 * len(words)
