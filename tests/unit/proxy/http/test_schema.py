"""Bodies of OpenAI requests: what is obeyed, ignored, refused; and what a request becomes for one model."""

from __future__ import annotations

import difflib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from baton.node.errors import BadRequest
from baton.node.messages.base import MAX_TOKENS
from baton.node.messages.control import SamplingSpec
from baton.proxy.http.parameters import IGNORED, MAX_UNKNOWN, UNSUPPORTED
from baton.proxy.http.prepare import Choice, choices_of
from baton.proxy.http.schema import ChatBody, CompletionBody, read_chat, read_completion
from baton.proxy.http.template_options import render_options
from baton.proxy.interface import AppSettings
from baton.proxy.tenants.tenants import Tenants
from baton.proxy.text.model_text import ModelText

ONE = Tenants.one([]).of_key(b"")
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "Hi"}]}
COMPLETION = {"model": "demo", "prompt": "Hi"}


def body(base: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({**base, **more}).encode()


def refused(base: dict[str, Any], **more: Any) -> BadRequest:
    with pytest.raises(BadRequest) as raised:
        (read_chat if base is CHAT else read_completion)(body(base, **more))
    assert raised.value.status == 400
    return raised.value


async def prepared(text: ModelText, base: dict[str, Any], **more: Any) -> list[Choice]:
    request = (read_chat if "messages" in base else read_completion)(body(base, **more))
    return await choices_of(request, text, AppSettings(), 2048, "r", ONE)


async def sampling(text: ModelText, base: dict[str, Any], **more: Any) -> SamplingSpec:
    return (await prepared(text, base, **more))[0].generation.sampling


# ---- what is refused ----------------------------------------------------------------------------------------------

WRONG_VALUES = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 2**70),
    ("max_tokens", 1.5),
    ("max_tokens", "16"),
    ("max_tokens", True),
    ("n", 0),
    ("n", 2**70),
    ("temperature", -0.1),
    ("temperature", 1e300),
    ("temperature", "hot"),
    ("top_p", -0.1),
    ("top_p", 1.1),
    ("top_k", -2),
    ("top_k", 2**40),
    ("min_p", 2),
    ("seed", 2**63),
    ("seed", 0.5),
    ("presence_penalty", 3),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0),
    ("logit_bias", {"5": 101}),
    ("logit_bias", {"five": 1}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"05": 60, "5": 60}),
    ("logit_bias", {"\u0665": 1}),
    ("logit_bias", {"5\n": 1}),
    ("allowed_token_ids", []),
    ("allowed_token_ids", [-1]),
    ("allowed_token_ids", 5),
    ("allowed_token_ids", list(range(1025))),
    ("bad_words", "word"),
    ("bad_words", [""]),
    ("bad_words", [5]),
    ("bad_words", ["x" * 257]),
    ("bad_words", ["x"] * 65),
    ("logit_bias", [1]),
    ("logit_bias", {str(n): 1 for n in range(1025)}),
    ("stop", ["a"] * 17),
    ("stop", ["a", ""]),
    ("stop", ""),
    ("stop", 5),
    ("stop", "x" * 2000),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [2**40]),
    ("stop_token_ids", [1] * 65),
    ("stop_token_ids", [1.5]),
    ("stop_token_ids", ["1"]),
    ("min_tokens", -1),
    ("priority", 1 << 63),
    ("truncate_prompt_tokens", -2),
    ("truncate_prompt_tokens", 0),
    ("stream", 1),
    ("stream", "true"),
    ("ignore_eos", "no"),
    ("model", ""),
    ("model", 5),
    ("model", None),
]


@pytest.mark.parametrize("base", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize(("name", "value"), WRONG_VALUES)
def test_a_wrong_value_is_refused_by_name(base: dict[str, Any], name: str, value: object) -> None:
    """Guards against a value out of bounds or of another type reaching a worker, or an error that hides its name."""
    error = refused(base, **{name: value})
    assert error.param is not None and error.param.split(".")[0] == name
    assert name in str(error)


@pytest.mark.parametrize("base", [CHAT, COMPLETION], ids=["chat", "completion"])
@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_refused(base: dict[str, Any], number: str) -> None:
    """Guards against NaN reaching the sampler, where it passes every comparison."""
    read = read_chat if base is CHAT else read_completion
    with pytest.raises(BadRequest):
        read(body(base, temperature=0.5).replace(b"0.5", number.encode()))


PROMPTS: list[Any] = [
    5,
    None,
    {},
    [],
    [[]],
    [1.5],
    [True],
    [-1],
    [2**40],
    ["a", 1],
    [1, "a"],
    [["a"]],
    [[1], "a"],
    ["a"] * 5000,
]


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: str(prompt)[:20])
async def test_a_prompt_of_another_shape_is_refused(text: ModelText, prompt: object) -> None:
    """Guards against token ids that are booleans or fractions, and against empty prompts."""
    with pytest.raises(BadRequest) as raised:
        await prepared(text, COMPLETION, prompt=prompt)
    assert raised.value.param == "prompt"


MESSAGES: list[Any] = [
    [],
    None,
    "Hi",
    [{}],
    [{"role": "user"}],
    [{"role": "user", "content": None}],
    [{"role": "robot", "content": "x"}],
    [{"content": "x"}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://host/x.png"}}]}],
    [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}],
    [{"role": "assistant", "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f", "input": ""}}]}],
    [{"role": "user", "content": "x", "tool_cals": []}, {"role": "user", "content": "x", "reasoning_contnet": "y"}],
    [{"role": "user", "content": "x", "images": ["aGk="]}],
    [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}],
]


@pytest.mark.parametrize("messages", MESSAGES, ids=lambda messages: str(messages)[:60])
def test_messages_of_another_shape_are_refused(messages: object) -> None:
    """Guards against images silently dropped, tool calls lost, and roles that the template would guess."""
    error = refused(CHAT, messages=messages)
    assert error.param is not None and error.param.startswith("messages")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'"text"',
        b"\xff\xfe",
        b'{"model": "demo", "prompt": "\xff"}',
        b'{"model": "demo", "prompt": "\\ud800"}',
        b'{"model": "demo", "prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
        b'{"model": "demo", "prompt": "x", "metadata": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_000 + b"}",
        b'{"model": "demo", "prompt": ' + b"[" + b"[]," * 1_000_000 + b"[]]}",
        b'{"model": "demo", "prompt": "x", "seed": ' + b"1" * 10_000 + b"}",
        b'{"model": "demo", "prompt": "x"} trailing',
        b"PUT / HTTP/1.1",
    ],
    ids=lambda raw: repr(raw[:30]),
)
def test_bytes_that_are_no_request_are_refused(raw: bytes) -> None:
    """Guards against a crash, or a stalled event loop, on JSON that is broken, deep, huge or not UTF-8."""
    for read in (read_completion, read_chat):
        with pytest.raises(BadRequest) as raised:
            read(raw)
        assert raised.value.status == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
names = sorted({*CHAT, *COMPLETION, *(name for name, _ in WRONG_VALUES), "logprobs", "stream_options", *UNSUPPORTED})


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(names), json_values, max_size=6))
def test_any_json_is_parsed_or_a_bad_request(values: dict[str, Any]) -> None:
    """Guards against any other exception, which a client would see as a failure of the server."""
    for read, base in ((read_completion, COMPLETION), (read_chat, CHAT)):
        try:
            read(json.dumps({**base, **values}).encode())
        except BadRequest as error:
            assert str(error)


def test_a_body_of_brackets_is_refused_before_it_is_parsed() -> None:
    """Guards against an event loop held for seconds by the JSON that is dearest to parse."""
    with pytest.raises(BadRequest, match="arrays and objects"):
        read_completion(b'{"model": "demo", "prompt": [' + b"[]," * 1_000_000 + b"[]]}")


def test_a_body_of_keys_is_refused_before_it_is_parsed() -> None:
    """Guards against an event loop held for seconds by an object with a million entries, however they are written."""
    entries = b",".join(b'"%x" :1' % n for n in range((1 << 18) + 1))
    with pytest.raises(BadRequest, match="keys"):
        read_completion(b'{"model": "demo", "prompt": "x", "logit_bias": {' + entries + b"}}")


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        (b"[" + b"{}," * (1 << 16) + b"{}]", "arrays and objects"),
        (b"[" + b'"",' * (1 << 17) + b'""]', "strings"),
        (b'["\\\\",' + b'"\\"",' * (1 << 17) + b'""]', "strings"),
        (b"[" + b"5," * 1_200_000 + b"5]", "values"),
    ],
)
def test_a_body_of_one_kind_of_structure_is_refused(prompt: bytes, what: str) -> None:
    """Guards against every other kind of JSON that holds the event loop: values in an array, strings, escapes."""
    with pytest.raises(BadRequest, match=what):
        read_completion(b'{"model": "demo", "prompt": ' + prompt + b"}")


@pytest.mark.parametrize("text", ['[{,"' * 400_000, '\\"[]' * 300_000, "\\" * 1_000_000])
def test_text_is_no_structure(text: str) -> None:
    """Guards against refusing a prompt for what is written in it, such as code or JSON, however it is escaped."""
    assert read_completion(json.dumps({**COMPLETION, "prompt": text}).encode()).prompts == (text,)


def test_the_longest_prompt_of_token_ids_is_accepted() -> None:
    """Guards against bounds that keep out a prompt which fits a model, also with ids written as 5.0."""
    for number in (b"5", b"5.0"):
        ids = b", ".join([number] * MAX_TOKENS)
        assert read_completion(b'{"model": "demo", "prompt": [' + ids + b"]}").prompts == ((5,) * MAX_TOKENS,)
    for wrong in (b"5.5", b"1e999", b'"5"', b"true", b"-1.0", b"1e300"):
        with pytest.raises(BadRequest, match="prompt must be"):
            read_completion(b'{"model": "demo", "prompt": [5, ' + wrong + b"]}")


def test_the_arguments_of_all_tool_calls_are_bounded_together() -> None:
    """Guards against JSON in strings, which is parsed for the template, without the bounds of the body."""
    call = {"function": {"name": "f", "arguments": '{"a": [' + "1," * 10_000 + "1]}"}}
    message = {"role": "assistant", "tool_calls": [call] * 50}
    assert read_chat(json.dumps({**CHAT, "messages": [message] * 2}).encode()).messages
    with pytest.raises(BadRequest, match="values"):
        read_chat(json.dumps({**CHAT, "messages": [message] * 3}).encode())


def test_too_many_biases_are_counted_before_they_are_checked() -> None:
    """Guards against an error for each of a hundred thousand entries, which takes seconds."""
    wrong = json.dumps({**COMPLETION, "logit_bias": {f"x{n}": "y" for n in range(5000)}})
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate_json(wrong)
    assert caught.value.error_count() == 1
    assert "at most 1024" in str(refused(COMPLETION, logit_bias={str(n): 0 for n in range(1025)}))


def test_few_unknown_names_are_compared_with_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against an event loop held for minutes: a comparison takes a millisecond, a body has a million names."""
    compared: list[str] = []
    compare = difflib.get_close_matches

    def counted(name: str, *args: Any, **kwargs: Any) -> list[str]:
        compared.append(name)
        return compare(name, *args, **kwargs)

    monkeypatch.setattr(difflib, "get_close_matches", counted)
    many = {f"surprise{n}" * 3: 1 for n in range(1000)}
    read_completion(body(COMPLETION, **many, stream=True, stream_options=many))
    read_chat(body(CHAT, **many, messages=[{"role": "user", "content": "x", **many}] * 100))
    assert len(compared) == 4 * MAX_UNKNOWN


def test_variables_of_a_template_are_not_written_to_their_end() -> None:
    """Guards against seconds spent on measuring megabytes of a body that is refused for its first 64 KiB."""
    request = ChatBody.model_construct(chat_template_kwargs={"a": "x" * (1 << 16), "b": object()})
    with pytest.raises(BadRequest, match="more than 65536 characters"):
        render_options(request)


def test_values_are_not_repeated_in_errors() -> None:
    """Guards against prompts in error messages, which end up in logs."""
    assert "secret" not in str(refused(COMPLETION, max_tokens="secret words"))
    assert "secret" not in str(refused(CHAT, messages=[{"role": "secret", "content": "secret"}]))


MISSPELT = [
    ("temprature", "temperature"),
    ("max_token", "max_tokens"),
    ("maxTokens", "max_tokens"),
    ("max_new_tokens", "max_tokens"),
    ("top-k", "top_k"),
    ("stop_token", "stop_token_ids"),
    ("respons_format", "response_format"),
]


@pytest.mark.parametrize(("name", "meant"), MISSPELT)
def test_a_misspelt_parameter_is_refused_with_its_name(name: str, meant: str) -> None:
    """Guards against a misspelt parameter silently lost."""
    for base in (CHAT, COMPLETION):
        error = refused(base, **{name: 1})
        assert (error.code, error.param) == ("unknown_parameter", name)
        assert f"Did you mean {meant}?" in str(error)


def test_a_misspelt_parameter_inside_another_is_refused() -> None:
    """Guards against checking names at the top of the body only."""
    options = {"include_usages": True}
    assert refused(COMPLETION, stream=True, stream_options=options).param == "stream_options.include_usages"
    messages = [{"role": "user", "content": "x", "names": "y"}]
    assert refused(CHAT, messages=messages).param == "messages.0.names"


@pytest.mark.parametrize("name", ["do_remote_prefill", "x" * 5000, "top_a", "mirostat", "keep_alive", "num_ctx"])
def test_an_unknown_parameter_is_reported(name: str) -> None:
    """Guards against clients that break on parameters of other servers, and against names of any length in a log."""
    for base, read in ((CHAT, read_chat), (COMPLETION, read_completion)):
        assert read(body(base, **{name: 1})).unknown == (name[:64],)
        assert read(body(base, **{name: None})).unknown == ()
    inside = read_completion(body(COMPLETION, stream=True, stream_options={"surprise": 1}))
    assert inside.unknown == ("stream_options.surprise",)
    many = [{"role": "user", "content": "x", "createdAt": 1}] * 3
    assert read_chat(body(CHAT, messages=many)).unknown == ("messages.createdAt",)
    assert len(read_completion(body(COMPLETION, **{f"surprise{n}" * 3: 1 for n in range(100)})).unknown) == 16


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_a_parameter_without_effect_is_ignored(name: str) -> None:
    """Guards against refusing what OpenAI's own client and its users send along."""
    for base, read in ((CHAT, read_chat), (COMPLETION, read_completion)):
        assert read(body(base, **{name: {"any": ["thing"]}})) == read(body(base))


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_an_unsupported_parameter_is_refused_unless_it_asks_for_nothing(name: str) -> None:
    """Guards against tools or a response format ignored, which the client would notice much later."""
    assert refused(CHAT, **{name: {"type": "json_object"}}).param == name
    for neutral in (None, *UNSUPPORTED[name][0]):
        assert read_chat(body(CHAT, **{name: neutral})) == read_chat(body(CHAT))


VLLM_DEFAULTS: dict[str, Any] = {
    "use_beam_search": False,
    "length_penalty": 1.0,
    "min_tokens": 0,
    "stop": [],
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "spaces_between_special_tokens": True,
    "truncate_prompt_tokens": None,
    "truncation_side": None,
    "allowed_token_ids": None,
    "logprob_token_ids": None,
    "bad_words": [],
    "logits_processors": None,
    "watermarking": None,
    "priority": 0,
    "session_id": None,
    "return_tokens_as_token_ids": None,
    "return_token_ids": None,
    "routed_experts_prompt_start": 0,
    "return_token_offsets": False,
    "return_mm_kwargs": True,
    "cache_salt": None,
    "kv_transfer_params": None,
    "ec_transfer_params": None,
    "vllm_xargs": None,
    "repetition_detection": None,
    "thinking_token_budget": None,
    "stream_interval": None,
    "structured_outputs": None,
    "guided_json": None,
    "response_format": None,
    "stream": False,
    "n": 1,
}
VLLM_CHAT = {"echo": False, "documents": None, "chat_template": None, "mm_processor_kwargs": None}
VLLM_CHAT |= {"tools": None, "tool_choice": "none", "include_reasoning": True, "media_io_kwargs": None}
VLLM_COMPLETION = {"echo": False, "suffix": None, "prompt_embeds": None, "add_special_tokens": True, "best_of": 1}


def test_a_body_with_all_of_vllms_defaults_asks_for_nothing() -> None:
    """Guards against refusing, or warning of, a client that sends every field of vLLM's protocol at its default."""
    for base, read, own in ((CHAT, read_chat, VLLM_CHAT), (COMPLETION, read_completion, VLLM_COMPLETION)):
        parsed = read(body(base, **VLLM_DEFAULTS, **own))
        assert parsed.unknown == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_beam_search", True),
        ("length_penalty", 0.5),
        ("kv_transfer_params", {"do_remote_prefill": True}),
        ("logits_processors", ["module.processor"]),
        ("guided_decoding_backend", "outlines"),
        ("chat_template", "{{ messages }}"),
        ("documents", [{"title": "a", "text": "b"}]),
        ("mm_processor_kwargs", {"num_crops": 4}),
        ("prompt_embeds", "AAAA"),
        ("suffix", "end"),
    ],
)
def test_what_is_not_here_is_refused_by_a_sentence(name: str, value: object) -> None:
    """Guards against another answer than the one asked for, and against obeying another server's transfers."""
    for base in (CHAT, COMPLETION):
        error = refused(base, **{name: value})
        assert (error.param, error.code) == (name, "unsupported_parameter")
        assert str(error).startswith(f"{name} is not supported: ")


def test_contradictions_are_refused() -> None:
    """Guards against one of two contradicting parameters silently winning."""
    assert refused(COMPLETION, best_of=3, n=2).param == "best_of"
    assert refused(COMPLETION, prompt_logprobs=1, stream=True).param == "prompt_logprobs"
    assert refused(CHAT, max_tokens=0).param == refused(COMPLETION, max_tokens=0).param == "max_tokens"
    assert refused(CHAT, prompt_logprobs=-1).param == "prompt_logprobs"
    assert refused(COMPLETION, logprobs=21).param == "logprobs"
    assert refused(COMPLETION, min_tokens=5, max_tokens=4).param == "min_tokens"
    assert refused(COMPLETION, stream_options={"include_usage": True}).param == "stream_options"
    assert refused(CHAT, top_logprobs=2).param == "top_logprobs"
    assert refused(CHAT, logprobs=True, top_logprobs=21).param == "top_logprobs"
    for base in (CHAT, COMPLETION):
        assert refused(base, max_tokens=5, max_completion_tokens=6).param == "max_tokens"


def test_a_whole_number_may_be_written_with_a_fraction_of_zero() -> None:
    """Guards against refusing 4.0 from languages with one type of numbers; 4.5 and "4" stay wrong."""
    for written, plain in (("4.0", "4"), ("4e0", "4"), ("40e-1", "4")):
        for name in ("max_tokens", "top_k", "seed", "n", "min_tokens", "logprobs"):
            given, expected = (f'{{"model": "m", "prompt": "x", "{name}": {number}}}' for number in (written, plain))
            assert read_completion(given.encode()) == read_completion(expected.encode())
    ids = read_completion(body(COMPLETION, prompt=[[1.0, 2], [3]], stop_token_ids=[5.0]))
    assert (ids.prompts, ids.sampling.stop_token_ids) == (((1, 2), (3,)), [5])
    assert read_completion(body(COMPLETION, prompt=[1.0, 2])).prompts == ((1, 2),)


# ---- what is obeyed -----------------------------------------------------------------------------------------------


async def test_every_sampling_parameter_arrives(text: ModelText) -> None:
    """Guards against a parameter accepted and then dropped on the way to the worker."""
    asked: dict[str, Any] = {
        "max_tokens": 7,
        "min_tokens": 3,
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 11,
        "min_p": 0.125,
        "seed": 42,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
    }
    more = {"logit_bias": {"7": 1.5, "5": -100}, "stop_token_ids": [9], "logprobs": 4, "allowed_token_ids": [8, 7, 8]}
    more["bad_words"] = ["fox"]
    expected = SamplingSpec(
        **asked,
        logit_bias=((5, -100.0), (7, 1.5)),
        stop_token_ids=(0, 1, 9),
        logprobs=True,
        top_logprobs=4,
        allowed_token_ids=(7, 8),
        bad_words=tuple(sorted(text.encode(form, add_special_tokens=False) for form in ("fox", " fox"))),
    )
    assert await sampling(text, COMPLETION, **asked, **more) == expected
    more["logprobs"], more["top_logprobs"] = True, 4
    assert await sampling(text, CHAT, **asked, **more) == expected


async def test_what_is_not_said_is_the_models_default(text: ModelText) -> None:
    """Guards against null taken for a value, and against generation_config.json not read."""
    nulls = dict.fromkeys(["temperature", "top_p", "top_k", "min_p", "stop", "n", "logprobs", "stream_options", "seed"])
    made = await sampling(text, COMPLETION, **nulls)
    assert (made.temperature, made.top_p, made.top_k, made.min_p) == (0.7, 0.9, 0, 0.0)
    assert (made.logprobs, made.stop_token_ids, made.max_tokens) == (False, (0, 1), 16)
    assert (await sampling(text, COMPLETION, temperature=0)).temperature == 0.0
    assert (await sampling(text, COMPLETION, top_k=-1)).top_k == 0


@pytest.mark.parametrize("word", ["fox", " fox", "unbelievable", "the end", "\n", " ", "<|end|>"])
async def test_a_bad_word_is_all_token_sequences_of_it(text: ModelText, word: str) -> None:
    """Guards a word at the beginning of an answer, and behind a space, where byte-level tokenizers have another token;
    a leading space of the client's changes nothing."""
    plain = word.lstrip(" ") or word
    forms = {text.encode(form, add_special_tokens=False) for form in (plain, f" {plain}")}
    made = await sampling(text, COMPLETION, bad_words=[word, word])
    assert set(made.bad_words) == forms and len(made.bad_words) == len(forms)
    assert (await sampling(text, COMPLETION, bad_words=[])).bad_words == ()


async def test_a_top_p_of_0_leaves_the_likeliest_token(text: ModelText) -> None:
    """Guards against refusing what OpenAI's API allows, and against a share of 0 reaching the sampler."""
    made = await sampling(text, COMPLETION, top_p=0, top_k=50, temperature=1.5)
    assert (made.top_k, made.top_p, made.temperature) == (1, 1.0, 1.5)


def test_a_lower_priority_is_served_first_as_in_vllm() -> None:
    """Guards against clients of vLLM served in the inverse order, and against times as priorities cut off."""
    priorities = [read_chat(body(CHAT, priority=asked)).priority for asked in (-1, 0, 1, 1_790_000_000_123, 2**63 - 1)]
    assert priorities == sorted(priorities, reverse=True) and len(set(priorities)) == 5


async def test_a_long_prompt_is_cut_where_asked(text: ModelText) -> None:
    """Guards against a refusal of a prompt that truncate_prompt_tokens makes fit, and the wrong end kept."""
    ids = list(range(5, 2505))
    for more, kept in (
        ({"truncate_prompt_tokens": 3}, ids[-3:]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, ids[:3]),
        ({"truncate_prompt_tokens": -1}, ids[-2047:]),
        ({"truncate_prompt_tokens": -1, "max_tokens": 48}, ids[-2000:]),
    ):
        assert (await prepared(text, COMPLETION, prompt=ids, **more))[0].generation.prompt_ids == tuple(kept)
    short = await prepared(text, COMPLETION, prompt="Hi there", truncate_prompt_tokens=100, echo=True)
    assert short[0].echo == "Hi there"
    cut = (await prepared(text, COMPLETION, prompt="Hi there", truncate_prompt_tokens=1, echo=True))[0]
    assert len(cut.generation.prompt_ids) == 1 and cut.echo == text.decode(cut.generation.prompt_ids)
    with pytest.raises(BadRequest) as raised:
        await prepared(text, COMPLETION, prompt=ids, truncate_prompt_tokens=2048)
    assert raised.value.code == "context_length_exceeded"
    words = await prepared(
        text, CHAT, messages=[{"role": "user", "content": "word " * 50_000}], truncate_prompt_tokens=7
    )
    assert len(words[0].generation.prompt_ids) == 7


async def test_ignore_eos_leaves_only_the_clients_stop_tokens(text: ModelText) -> None:
    """Guards against an answer ended by the model's end token although the client said to go on."""
    assert (await sampling(text, COMPLETION, ignore_eos=True)).stop_token_ids == ()
    assert (await sampling(text, COMPLETION, ignore_eos=True, stop_token_ids=[1])).stop_token_ids == (1,)


async def test_seeds(text: ModelText) -> None:
    """Guards against n equal answers, answers that a batch changes, and seeds out of the wire's range."""
    seeds = [made.generation.sampling.seed for made in await prepared(text, COMPLETION, prompt=["a", "b"], n=3, seed=5)]
    assert seeds == [5, 6, 7, 5, 6, 7]
    drawn = [made.generation.sampling.seed for made in await prepared(text, COMPLETION, n=8)]
    assert len(set(drawn)) == 8
    for seed in (-(2**63), -1, 2**63 - 1):
        assert all(
            0 <= made.generation.sampling.seed < 2**63 for made in await prepared(text, COMPLETION, seed=seed, n=2)
        )


async def test_shapes_of_prompts(text: ModelText) -> None:
    """Guards against a list of ids read as many prompts, and against choices in another order than prompts."""
    hi = text.encode("Hi", add_special_tokens=True)
    for prompt, expected in (
        ("Hi", [hi]),
        (["Hi", "Hi"], [hi, hi]),
        ([5, 6], [(5, 6)]),
        ([[5], [6, 7]], [(5,), (6, 7)]),
    ):
        made = await prepared(text, COMPLETION, prompt=prompt, n=2)
        assert [choice.generation.prompt_ids for choice in made] == [ids for ids in expected for _ in range(2)]
        assert [choice.index for choice in made] == list(range(len(made)))


async def test_echo(text: ModelText) -> None:
    """Guards against echoing text that was not the client's, or dropping special tokens of given ids."""
    assert [made.echo for made in await prepared(text, COMPLETION, prompt=["Hi ", "ho"], echo=True)] == ["Hi ", "ho"]
    ids = list(text.encode("Hi<|end|>", add_special_tokens=False))
    assert (await prepared(text, COMPLETION, prompt=ids, echo=True))[0].echo == "Hi<|end|>"
    assert (await prepared(text, COMPLETION))[0].echo == ""


def test_tool_calls_and_reasoning_reach_the_template() -> None:
    """Guards against agents broken at their second turn: history of tools is the template's business."""

    def call(arguments: object) -> dict[str, Any]:
        return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}, "index": 0}

    written: list[object] = ['{"a": 1}', {"a": 1}, "", None, " ", "{}"]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "tool_calls": [call(each) for each in written]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}], "reasoning_content": "why"},
        {"role": "assistant", "content": "yes", "reasoning": "so", "tool_calls": []},
    ]
    parsed = read_chat(body(CHAT, messages=messages))
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        for arguments in ({"a": 1}, {"a": 1}, {}, {}, {}, {})
    ]
    assert parsed.messages == (
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
        {"role": "assistant", "content": "no", "reasoning": "why", "reasoning_content": "why"},
        {"role": "assistant", "content": "yes", "reasoning": "so", "reasoning_content": "so"},
    )
    assert parsed.unknown == ()


@pytest.mark.parametrize("arguments", ["{broken", "[1]", "null", '"{}"', "NaN"])
def test_arguments_in_the_history_that_are_no_object_are_refused(arguments: str) -> None:
    """Guards against a template that shows the model a call without the arguments that the client sent."""
    calls = [{"id": "1", "function": {"name": "f", "arguments": each}} for each in ("{}", arguments)]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    with pytest.raises(BadRequest, match="is not a JSON object") as raised:
        read_chat(body(CHAT, messages=messages))
    assert raised.value.param == "messages.1.tool_calls.1.function.arguments"


async def test_parts_of_text_and_answers_sent_back(text: ModelText) -> None:
    """Guards against refusing the message that a client got from us and sends back with the next turn."""
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "yes",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "tool_calls": None,
    }
    messages = [{"role": "user", "content": parts}, answer, {"role": "user", "content": "on", "name": "me"}]
    made = (await prepared(text, CHAT, messages=messages))[0]
    shown = text.decode(made.generation.prompt_ids, skip_special_tokens=False)
    assert shown == "<|user|>\none\ntwo<|end|>\n<|assistant|>\nyes<|end|>\n<|user|>\non<|end|>\n<|assistant|>\n"


# ---- what depends on the model ------------------------------------------------------------------------------------


async def test_the_context_length(text: ModelText) -> None:
    """Guards against an answer cut by the model's limit, or a request that no worker can hold, being sent on."""
    assert (await sampling(text, COMPLETION, prompt=[5] * 2040, max_tokens=8)).max_tokens == 8
    for more in ({"prompt": [5] * 2040, "max_tokens": 9}, {"prompt": [5] * 2048}, {"prompt": "word " * 50_000}):
        with pytest.raises(BadRequest) as raised:
            await prepared(text, COMPLETION, **more)
        assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "prompt")
    assert (await sampling(text, COMPLETION, prompt=[5] * 2040)).max_tokens == 8
    prompt_len = len((await prepared(text, CHAT))[0].generation.prompt_ids)
    assert (await sampling(text, CHAT)).max_tokens == 2048 - prompt_len
    assert (await sampling(text, CHAT, max_completion_tokens=9)).max_tokens == 9
    assert (await sampling(text, COMPLETION, max_completion_tokens=9)).max_tokens == 9
    assert (await sampling(text, COMPLETION, min_tokens=40)).max_tokens == 40
    request = read_chat(body(CHAT))
    long_context = await choices_of(request, text, AppSettings(), 100_000, "r", ONE)
    assert long_context[0].generation.sampling.max_tokens == 100_000 - prompt_len


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [[5], [2**31 - 1]]}, "prompt"),
        ({"stop_token_ids": [4096]}, "stop_token_ids"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"allowed_token_ids": [5, 4096]}, "allowed_token_ids"),
        ({"allowed_token_ids": [0, 1], "min_tokens": 2}, "allowed_token_ids"),  # both end the answer
        ({"allowed_token_ids": [266], "bad_words": ["the"]}, "allowed_token_ids"),
        ({"bad_words": ["fine", "\u4e2d" * 33]}, "bad_words.1"),
        ({"n": 17}, "n"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"min_tokens": 3000}, "min_tokens"),
    ],
    ids=str,
)
async def test_what_the_model_or_the_settings_do_not_allow(text: ModelText, more: dict[str, Any], param: str) -> None:
    """Guards against an index outside the embedding table, and work without bounds."""
    with pytest.raises(BadRequest) as raised:
        await prepared(text, COMPLETION, **more)
    assert raised.value.param == param


def test_a_conversation_is_known_by_its_digest() -> None:
    """Guards the policy `session`: the same key leads to the same place, and nothing but its digest goes on."""
    for base, read in ((CHAT, read_chat), (COMPLETION, read_completion)):
        keys = [
            read(body(base, **more)).session_key
            for more in ({}, {"user": "ann"}, {"user": "bob"}, {"prompt_cache_key": "ann"}, {"user": ""})
        ]
        assert keys[0] == keys[4] == b"" and keys[1] == keys[3] != keys[2]
        assert {len(key) for key in keys[1:4]} == {16}
        both = read(body(base, user="ann", prompt_cache_key="bob")).session_key
        assert both == keys[2], "a conversation is narrower than its user"
        assert refused(base, user=5).param == "user"
        assert refused(base, prompt_cache_key="x" * 5000).param == "prompt_cache_key"
