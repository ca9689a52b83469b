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


def render(messages: list[dict], add_generation_prompt: bool) -> str:
    template = jinja2.sandbox.ImmutableSandboxedEnvironment().from_string(
        read("tokenizer_config.json")["chat_template"]
    )
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt)


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
