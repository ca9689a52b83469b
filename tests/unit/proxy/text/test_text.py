"""Tokenizer folders, chat templates and incremental detokenisation; over more tokenizers where there are any.

The demo model's tokenizer is always tested. Those of real models are read from the folder shared/data/tokenizers beside
the repository, or from the one that BATON_TEST_TOKENIZERS names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from baton.node.errors import BadRequest, SettingsError
from baton.proxy.http.prepare import choices_of
from baton.proxy.http.schema import read_completion
from baton.proxy.interface import AppSettings
from baton.proxy.tenants.tenants import Tenants
from baton.proxy.text.model_files import SamplingDefaults
from baton.proxy.text.model_text import LONG_TEXT_CHARS, ModelText
from baton.proxy.text.template import ChatTemplate, RenderOptions

ONE = Tenants.one([]).of_key(b"")
BESIDE = Path(__file__).resolve().parents[5] / "shared" / "data" / "tokenizers"
EXTRA = sorted(path.parent for path in Path(os.environ.get("BATON_TEST_TOKENIZERS", BESIDE)).glob("*/tokenizer.json"))
unicode_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
words = st.lists(
    st.sampled_from(["日本語", " the", "é", "👩‍👩‍👧", "\n", " ", "  ", "ß", "x" * 9, "नमस्ते", "<|end|>"])
).map("".join)
moderate = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def streamed(text: ModelText, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = text.detokenizer(prompt_ids)
    return [detokenizer.push(token) for token in ids] + [detokenizer.flush()]


@pytest.fixture(
    scope="module",
    params=["demo", "byte_fallback", "unigram", "wordpiece", *EXTRA],
    ids=lambda param: getattr(param, "name", param),
)
def any_text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> ModelText:
    if request.param == "demo":
        return ModelText(demo_folder)
    if request.param == "byte_fallback":
        return ModelText(byte_fallback_folder(tmp_path_factory.mktemp("llama2")))
    if request.param in ("unigram", "wordpiece"):
        return ModelText(word_folder(request.param, tmp_path_factory.mktemp(request.param)))
    return ModelText(request.param)


def word_folder(kind: str, folder: Path) -> Path:
    """A tokenizer whose decoder puts spaces between tokens but none before the first: SentencePiece's or BERT's."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    if kind == "unigram":
        pieces = ["<unk>", "\u2581", "\u2581the", "\u2581red", "\u2581fox", "es", *letters]
        tokenizer = Tokenizer(models.Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=0))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        pieces = ["[UNK]", "the", "red", "fox", "##es", *letters, *(f"##{letter}" for letter in letters)]
        vocab = {piece: rank for rank, piece in enumerate(pieces)}
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def byte_fallback_folder(folder: Path) -> Path:
    """A tokenizer of Llama 2's kind: unknown characters as byte tokens, a leading space that decoding strips."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdethx", "\u2581th"]
    merges = [("\u2581", "t")]
    vocab.insert(-1, "\u2581t")
    merges.append(("\u2581t", "h"))
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: rank for rank, piece in enumerate(vocab)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@moderate
@given(unicode_text | words)
def test_pieces_of_real_text_join_to_it_and_never_show_half_a_character(any_text: ModelText, written: str) -> None:
    """Guards against U+FFFD in streamed text where a character is spread over tokens, and against lost spaces."""
    ids = any_text.encode(written, add_special_tokens=False)
    pieces = streamed(any_text, ids)
    assert "".join(pieces) == any_text.decode(ids)
    if "\ufffd" not in written:
        assert not any("\ufffd" in piece for piece in pieces)


@moderate
@given(unicode_text | words, st.integers(0, 60))
def test_an_answer_goes_on_where_its_prompt_ends(any_text: ModelText, written: str, cut: int) -> None:
    """Guards against an answer's first space or character lost because its first token is taken for a text's first."""
    assume("\ufffd" not in written)
    ids = any_text.encode(written, add_special_tokens=False)
    begun = "".join(streamed(any_text, ids[:cut])).removesuffix("\ufffd")  # the answer completes the character
    assert begun + "".join(streamed(any_text, ids[cut:], ids[:cut])) == any_text.decode(ids)


@pytest.mark.parametrize("prompt", ["", "the"])
def test_tokens_of_log_probabilities_join_to_the_text(any_text: ModelText, prompt: str) -> None:
    """Guards against a space that the answer has, or lacks, and the tokens beside it do not."""
    written = "the red foxes."
    ids = any_text.encode(written, add_special_tokens=False)
    cut = len(any_text.encode(prompt, add_special_tokens=False)) if prompt else 0
    detokenizer, pieces, tokens = any_text.detokenizer(ids[:cut]), "", b""
    for token in ids[cut:]:
        tokens += any_text.token_bytes(token, detokenizer.at_start)
        pieces += detokenizer.push(token)
    assert pieces + detokenizer.flush() == tokens.decode() == written[len(prompt) :]


def test_bytes_that_are_no_character_are_replaced_once(tmp_path: Path) -> None:
    """Guards against three signs for one character cut off, and against bytes that wait for good."""
    text = ModelText(byte_fallback_folder(tmp_path))
    start, *three = text.encode("日", add_special_tokens=False)
    (the,) = text.encode("th", add_special_tokens=False)
    assert streamed(text, [start, *three]) == ["", "", "", "日", ""]
    assert streamed(text, [start, *three[:2]]) == ["", "", "", "\ufffd"]
    assert streamed(text, [*three[:2], the]) == ["", "", "\ufffd th", ""]
    assert streamed(text, three[2:] * 3, three[:2]) == ["日", "\ufffd", "\ufffd", ""]
    detokenizer = text.detokenizer()
    for _ in range(100):
        assert detokenizer.push(three[0]) in ("", "\ufffd")
        assert len(detokenizer._window) <= 64


@moderate
@given(st.data())
def test_pieces_of_any_tokens_join_to_the_whole_decoded_at_once(any_text: ModelText, data: st.DataObject) -> None:
    """Guards against text lost, doubled or changed where a model produces bytes that are no text."""
    if not any_text._byte_level:
        pytest.skip("a byte-fallback decoder rewrites text already shown when a later byte is invalid")
    anything = st.integers(0, any_text.vocab_size - 1)
    ids = data.draw(st.lists(anything | st.integers(0, min(300, any_text.vocab_size - 1)), max_size=50))
    assert "".join(streamed(any_text, ids)) == any_text.decode(ids)


def test_bytes_that_never_become_a_character_are_handed_out_in_bounded_time(text: ModelText) -> None:
    """Guards against a window that grows, and decoding that becomes quadratic, over endless invalid bytes."""
    stray = next(token for token in range(text.vocab_size) if text.token_bytes(token) == b"\x80")
    detokenizer, pieces = text.detokenizer(), []
    for _ in range(1000):
        pieces.append(detokenizer.push(stray))
        assert len(detokenizer._window) <= 64
    assert "".join(pieces) + detokenizer.flush() == text.decode([stray] * 1000)


def test_an_unfinished_character_comes_out_at_the_end(text: ModelText) -> None:
    """Guards against the last bytes of an answer that hit max_tokens being lost."""
    ids = text.encode("é", add_special_tokens=False)
    assert len(ids) == 2, "the demo tokenizer is expected to spell é with two tokens"
    assert streamed(text, ids[:1]) == ["", "\ufffd"]


@moderate
@given(unicode_text)
def test_token_bytes_joined_are_the_texts_bytes(text: ModelText, written: str) -> None:
    """Guards against `bytes` in logprobs that do not rebuild the answer."""
    ids = text.encode(written, add_special_tokens=False)
    assert b"".join(map(text.token_bytes, ids)) == written.encode()


def test_token_bytes_of_byte_fallback_and_unknown_ids(tmp_path: Path) -> None:
    """Guards against `<0xE6>` shown as six letters, and a crash on an id beyond the tokenizer's table."""
    text = ModelText(byte_fallback_folder(tmp_path))
    assert b"".join(map(text.token_bytes, text.encode("the 日", add_special_tokens=False))) == " the 日".encode()
    assert text.token_bytes(100_000) == b""


def test_the_demo_folder_is_read(text: ModelText) -> None:
    """Guards against end tokens or sampling defaults missed in one of the files that may hold them."""
    assert text.eos_ids == (0, 1)
    assert text.vocab_size == 4096
    assert text.defaults == SamplingDefaults(temperature=0.7, top_p=0.9)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("generation_config.json", {"eos_token_id": [5, 7]}),
        ("config.json", {"eos_token_id": 7}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|end|>"}}),
    ],
)
def test_end_tokens_may_stand_in_any_of_three_files(
    tmp_path: Path, demo_folder: Path, name: str, content: dict[str, object]
) -> None:
    """Guards against answers that never end because a model names its end token in another file than most."""
    folder = copy_of(demo_folder, tmp_path)
    for other in ("generation_config.json", "config.json", "tokenizer_config.json"):
        (folder / other).write_text("{}")
    assert ModelText(folder).eos_ids == ()
    (folder / name).write_text(json.dumps(content))
    assert ModelText(folder).eos_ids == {"generation_config.json": (5, 7), "config.json": (7,)}.get(name, (1,))


def test_a_chat_is_rendered_and_its_special_tokens_are_single_tokens(text: ModelText) -> None:
    """Guards against template text tokenised as letters, and special tokens added a second time."""
    prompt = text.render([{"role": "user", "content": "Hi"}])
    assert prompt == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    ids = text.encode(prompt, add_special_tokens=False)
    assert text.decode(ids, skip_special_tokens=False) == prompt
    assert sum(token in text._special_ids for token in ids) == 3


def test_special_tokens_are_added_to_completions_as_the_tokenizer_says(tmp_path: Path, demo_folder: Path) -> None:
    """Guards against a missing, or a second, first token (`add_special_tokens`)."""
    folder = copy_of(demo_folder, tmp_path)
    described = json.loads((folder / "tokenizer.json").read_text())
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    text = ModelText(folder)
    plain = text.encode("hello", add_special_tokens=False)
    assert text.encode("hello", add_special_tokens=True) == (0, *plain)


def test_a_truncation_in_the_file_does_not_cut_prompts(tmp_path: Path, demo_folder: Path) -> None:
    """Guards against files saved by a training run, whose truncation silently cuts every prompt."""
    folder = copy_of(demo_folder, tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(folder / "tokenizer.json"))
    text = ModelText(folder)
    assert (
        text.decode(text.encode("one two three four five six", add_special_tokens=True))
        == "one two three four five six"
    )
    assert len(text.encode("one", add_special_tokens=True)) < 4


async def test_a_long_prompt_is_tokenised_off_the_loop_and_an_impossible_one_not_at_all(text: ModelText) -> None:
    """Guards against other answers stalling behind a long prompt, and against work on what cannot fit."""
    long = "word " * LONG_TEXT_CHARS
    ids = await text.encode_bounded(long, add_special_tokens=False, max_tokens=1 << 20, param="prompt")
    assert ids == text.encode(long, add_special_tokens=False)
    with pytest.raises(BadRequest) as raised:
        await text.encode_bounded(long, add_special_tokens=False, max_tokens=100, param="prompt")
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")


def copy_of(folder: Path, to: Path) -> Path:
    made = to / "model"
    made.mkdir()
    for path in folder.glob("*.json"):
        shutil.copy(path, made)
    return made


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[1, 2]"),
        ("tokenizer_config.json", "\x00"),
        ("tokenizer_config.json", '{"chat_template": 7}'),
        ("tokenizer_config.json", '{"chat_template": "{% for %}"}'),
        ("generation_config.json", '{"eos_token_id": '),
        ("config.json", "[" * 100_000),
    ],
)
def test_a_broken_folder_is_a_settings_error(tmp_path: Path, demo_folder: Path, name: str, content: str | None) -> None:
    """Guards against a traceback, or a late failure, where a model folder is incomplete or damaged."""
    folder = copy_of(demo_folder, tmp_path)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(SettingsError):
        ModelText(folder)


def test_a_model_without_a_template_says_so(tmp_path: Path, demo_folder: Path) -> None:
    """Guards against a base model answering chats with a prompt that it was never trained on."""
    folder = copy_of(demo_folder, tmp_path)
    (folder / "tokenizer_config.json").unlink()
    text = ModelText(folder)
    with pytest.raises(BadRequest, match="no chat template"):
        text.render([{"role": "user", "content": "Hi"}])


def test_sources_of_a_template(tmp_path: Path, demo_folder: Path) -> None:
    """Guards against the wrong template where there are several named ones, or a file of its own."""
    folder = copy_of(demo_folder, tmp_path)
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "named"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ModelText(folder).render([]) == "named"
    hermes = "{% for tool in tools %}<tool_call>{{ tool.function.name }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": {"default": "a", "tool_use": hermes}}))
    text = ModelText(folder)
    tools = ({"type": "function", "function": {"name": "look_up"}},)
    assert text.render([]) == "a" and text.render([], RenderOptions(tools=tools)) == "<tool_call>look_up"
    assert text.markup.has_calls and not text.ignores_tools
    text.close()
    (folder / "chat_template.jinja").write_text("file")
    assert ModelText(folder).render([]) == "file"
    (given := tmp_path / "given.jinja").write_text("given")
    assert ModelText(folder, chat_template=given).render([]) == "given"
    with pytest.raises(SettingsError, match=r"nowhere.jinja cannot be read"):
        ModelText(folder, chat_template=tmp_path / "nowhere.jinja")


@pytest.mark.parametrize(
    ("source", "role"),
    [
        ("{{ messages[0].role }}", "system"),
        ("{# developer #}developer {{ messages[0]['role'] }}", "developer system"),
        ("{% if messages[0].role in ['system', 'user'] %}{{ messages[0].role }}{% endif %}", "system"),
        ("{% if messages[0].role in ['system', 'developer'] %}{{ messages[0].role }}{% endif %}", "developer"),
        ("{% set own = {'developer': 1} %}{{ messages[0].role }}", "developer"),
    ],
)
def test_a_developer_message_reaches_the_model(source: str, role: str) -> None:
    """Guards against instructions that vanish because the template renders only the roles that it knows."""
    assert ChatTemplate(source, {}).render([{"role": "developer", "content": "Be brief."}]) == role


def test_templates_have_what_hugging_face_gives_them() -> None:
    """Guards against a template of a real model failing on a filter, tag, variable or function that it relies on."""
    source = """
    {%- for message in messages -%}
        {%- if loop.index0 == 1 -%}{%- continue -%}{%- endif -%}
        {{ message | tojson }}{% generation %}{{ bos_token }}{% endgeneration %}
    {%- endfor -%}
    {{ strftime_now("%Y") | length }}{{ tools is none }}{{ add_generation_prompt }}
    """
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render([{"role": "user", "content": "<é>'"}, {"role": "user", "content": "skipped"}])
    assert rendered.strip() == '{"role": "user", "content": "<é>\'"}<s>4TrueTrue'


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[0].nothing.more }}",
        "{{ messages[0] + 1 }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_a_template_that_fails_is_the_clients_error_and_cannot_leave_its_sandbox(source: str) -> None:
    """Guards against a 500 for messages that a model does not take, and against code in a downloaded template."""
    with pytest.raises(BadRequest, match="does not accept these messages"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}])


def test_more_tokenizers_are_only_skipped_loudly() -> None:
    """Guards against believing that real models' tokenizers were covered when none was there."""
    if not EXTRA:
        pytest.skip(
            f"no tokenizers in {BESIDE} or BATON_TEST_TOKENIZERS: only the demo's and a byte-fallback one were tested"
        )


CONVERSATION = [
    {"role": "system", "content": "Be brief. <é>'"},
    {"role": "user", "content": "Hi  there"},
    {"role": "assistant", "content": "Yo"},
    {"role": "user", "content": " What's up?\n"},
]


@pytest.mark.parametrize("folder", ["demo", *EXTRA], ids=lambda param: getattr(param, "name", param))
def test_chats_and_prompts_are_those_of_transformers(folder: Path | str, demo_folder: Path) -> None:
    """Guards against a prompt that differs by a blank or a first token from the one that the model was trained on."""
    transformers = pytest.importorskip("transformers")
    path = demo_folder if folder == "demo" else Path(folder)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(path), ModelText(path)
    rendered = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert ours.render(CONVERSATION) == rendered
    for written, special in ((rendered, False), ("Hello world, é 日本", True), ("", True)):
        expected = tuple(theirs(written, add_special_tokens=special)["input_ids"])
        assert ours.encode(written, add_special_tokens=special) == expected


async def test_a_token_beyond_the_models_table_is_refused_though_the_tokenizer_knows_it(
    tmp_path: Path, demo_folder: Path
) -> None:
    """Guards against a bias that is silently lost, and a prompt outside the embedding table."""
    folder = copy_of(demo_folder, tmp_path)
    (folder / "config.json").write_text('{"vocab_size": 4000}')
    text = ModelText(folder)
    assert (text.vocab_size, text.num_decodable) == (4000, 4096)
    base = {"model": "m", "prompt": [5], "max_tokens": 1}
    for more, param in (({"logit_bias": {"4000": 1}}, "logit_bias"), ({"prompt": [4000]}, "prompt")):
        with pytest.raises(BadRequest) as raised:
            await choices_of(read_completion(json.dumps(base | more).encode()), text, AppSettings(), 2048, "r", ONE)
        assert raised.value.param == param
