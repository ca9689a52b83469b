"""A parsed request and a model make choices: token ids and sampling parameters, everything checked before any work.

The place where text becomes tokens, and where the model's defaults replace what the client did not say. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from baton.kvtransfer.blocks.hashing import cache_salt
from baton.node.errors import BadRequest
from baton.node.messages.base import MAX_TOKENS
from baton.node.messages.control import MAX_BAD_WORD_TOKENS, MAX_PREDICTION_TOKENS, Grammar, SamplingSpec
from baton.proxy.formats.markup import Thinking
from baton.proxy.http.call_choice import answer_grammar
from baton.proxy.http.schema import ParsedRequest, SamplingRequest, check_beside_grammar
from baton.proxy.interface import AppSettings, Generation
from baton.proxy.routing.adapter_places import RequestAdapter
from baton.proxy.tenants.tenants import Tenant
from baton.proxy.text.grammar_request import ANY_TOKENS, GrammarRequest
from baton.proxy.text.model_text import ModelText

EXPECTED_TOKENS = 1024
"""Of an answer whose request does not bound it: mostly it ends long before the end of the context."""
_SEEDS = 1 << 63
_BY_NAME = tuple(
    name for name in SamplingRequest.model_fields if name in SamplingSpec.__struct_fields__ and name != "seed"
)
"""Sampling parameters that a client may set under the name that workers know."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice of the answer, before it is generated."""

    index: int
    generation: Generation
    echo: str
    """Text of the prompt that the answer begins with, mostly empty."""
    thinking: Thinking
    """Whether it begins with reasoning, for what reads it and for its grammar."""


async def choices_of(
    request: ParsedRequest,
    text: ModelText,
    settings: AppSettings,
    max_model_len: int,
    request_id: str,
    tenant: Tenant,
    adapter: RequestAdapter | None = None,
) -> list[Choice]:
    """All choices of `request`, n next to each other for each prompt; raises BadRequest.

    The k-th of n answers gets seed + k, so that a prompt has the same answers alone and in a batch.
    """
    if request.n > settings.max_n:
        raise BadRequest(f"n is {request.n}, at most {settings.max_n} are allowed", param="n")
    if len(request.prompts) > settings.max_prompts:
        raise BadRequest(f"{len(request.prompts)} prompts, at most {settings.max_prompts} are allowed", param="prompt")
    _check_ids(request.sampling, text.vocab_size)
    bad_words = await _bad_words(request.sampling.bad_words or (), text)
    form = _form(request, text)
    prediction = await _prediction(request, text, max_model_len)
    salt = cache_salt(request.cache_salt, tenant.cache_name)
    made: list[Choice] = []
    for ids, echo in await prompts_of(request, text, max_model_len):
        sampling = _sampling(request, text, bad_words, _max_tokens(request, settings, len(ids), max_model_len))
        expected = min(sampling.max_tokens, EXPECTED_TOKENS)
        thinking = text.thinking(ids) if request.tools is not None else Thinking.CLOSED
        grammar = await _grammar(request, form, text, thinking)
        for k in range(request.n):
            seed = secrets.randbits(63) if request.sampling.seed is None else (request.sampling.seed + k) % _SEEDS
            generation = Generation(
                request_id=f"{request_id}-{len(made)}",
                model=request.model,
                prompt_ids=ids,
                sampling=msgspec.structs.replace(sampling, seed=seed, grammar=grammar),
                tenant=tenant.name,
                speculate=request.speculate,
                prediction_ids=prediction,
                expected_tokens=sampling.max_tokens if request.max_tokens is not None else expected,
                priority=min(request.priority, -tenant.rules.priority_floor),
                follows=len(made) >= settings.max_generations,
                session_key=request.session_key,
                cache_salt=salt,
                adapter=adapter,
            )
            made.append(Choice(len(made), generation, echo, thinking))
    return made


async def _prediction(request: ParsedRequest, text: ModelText, max_model_len: int) -> tuple[int, ...] | None:
    """Ids of what the client predicts, as far as workers look at them; None if it predicts nothing."""
    if request.prediction is None:
        return None
    ids = await text.encode_bounded(
        request.prediction, add_special_tokens=False, max_tokens=max_model_len, param="prediction"
    )
    if len(ids) > max_model_len:
        raise BadRequest(f"prediction has {len(ids)} tokens, at most {max_model_len} can follow", param="prediction")
    return ids[:MAX_PREDICTION_TOKENS]


def _form(request: ParsedRequest, text: ModelText) -> GrammarRequest | None:
    """Of the answers; raises BadRequest where the model, or the rest of the request, does not allow it."""
    asked = request.grammar
    if request.tools is not None and request.tools.schemas:
        if not text.markup.has_calls:
            raise BadRequest(
                "this model has no tools: its chat template has none, or they are called in a format that is unknown "
                "here or switched off (--tool-format)",
                param="tools",
            )
        asked = answer_grammar(request.tools, asked, text.markup.with_calls)
    if asked is not None:
        check_beside_grammar(request.sampling)
    return asked


async def _grammar(
    request: ParsedRequest, form: GrammarRequest | None, text: ModelText, thinking: Thinking
) -> Grammar | None:
    """Of an answer in this form, if it has one, behind its reasoning, which may have a bound."""
    reasoning, most = text.markup.before_form(thinking), request.max_reasoning
    if most is None or reasoning is None:
        return None if form is None else await text.grammars.compile(form, reasoning)
    if not reasoning.end_ids:
        what = "this model's markers of reasoning are several tokens each"
        raise BadRequest(f"thinking_token_budget is not available: {what}", param="thinking_token_budget")
    check_beside_grammar(request.sampling, "with thinking_token_budget")
    found = await text.grammars.compile(form or ANY_TOKENS, reasoning)
    return msgspec.structs.replace(found, max_reasoning=most)


def reserved_tokens(choices: Sequence[Choice], n: int) -> int:
    """What a request of these choices, n for each prompt, may come to; usage counts a prompt once too."""
    prompts = sum(len(choice.generation.prompt_ids) for choice in choices[::n])
    return prompts + sum(choice.generation.expected_tokens for choice in choices)


async def prompts_of(request: ParsedRequest, text: ModelText, max_model_len: int) -> list[tuple[tuple[int, ...], str]]:
    """Ids of each prompt, checked, with the text to echo; raises BadRequest."""

    async def encode(prompt: str) -> tuple[int, ...]:
        return await text.encode_bounded(
            prompt,
            add_special_tokens=request.add_special_tokens,
            # A prompt that will be cut may be as long as a body.
            max_tokens=max_model_len if request.truncation is None else MAX_TOKENS,
            param=request.prompt_param,
        )

    if request.messages:
        prompt = await text.render_bounded(request.messages, request.render)
        if request.tools is not None and request.tools.schemas and text.ignores_tools:
            raise BadRequest("this model has no tools: its chat template does not show them", param="tools")
        ids = await encode(prompt)
        made = [(_checked(ids, text.vocab_size, request.prompt_param), "")]
    else:
        made = [await _tokenise_prompt(prompt, request.echo, text, encode, max_model_len) for prompt in request.prompts]
    if request.truncation is None:
        return made
    return [_cut(ids, echo, request, text, max_model_len) for ids, echo in made]


def _cut(
    ids: tuple[int, ...], echo: str, request: ParsedRequest, text: ModelText, max_model_len: int
) -> tuple[tuple[int, ...], str]:
    """The part of a prompt that is kept, with its text if the answer repeats it."""
    assert request.truncation is not None
    fits = max_model_len - max(1, request.max_tokens or request.sampling.min_tokens or 0)
    num_kept = max(1, fits if request.truncation.num_tokens is None else request.truncation.num_tokens)
    if len(ids) <= num_kept:
        return ids, echo
    kept = ids[:num_kept] if request.truncation.keep_first else ids[-num_kept:]
    return kept, text.decode(kept, skip_special_tokens=False) if echo else ""


async def _tokenise_prompt(
    prompt: str | tuple[int, ...],
    echo: bool,
    text: ModelText,
    encode: Callable[[str], Awaitable[tuple[int, ...]]],
    max_model_len: int,
) -> tuple[tuple[int, ...], str]:
    if isinstance(prompt, str):
        return _checked(await encode(prompt), text.vocab_size, "prompt"), prompt if echo else ""
    ids = _checked(prompt, text.vocab_size, "prompt")
    shown = echo and len(ids) <= max_model_len  # a longer one is cut, or refused
    return ids, text.decode(ids, skip_special_tokens=False) if shown else ""


def _checked(ids: tuple[int, ...], vocab_size: int, param: str) -> tuple[int, ...]:
    if not ids:
        raise BadRequest(f"{param} is empty: there must be at least one token", param=param)
    if max(ids) >= vocab_size:
        raise BadRequest(f"token id {max(ids)} is outside the vocabulary of {vocab_size}", param=param)
    return ids


def _check_ids(asked: SamplingRequest, vocab_size: int) -> None:
    biased = [int(token) for token in asked.logit_bias or ()]
    for param, ids in (
        ("stop_token_ids", asked.stop_token_ids or ()),
        ("allowed_token_ids", asked.allowed_token_ids or ()),
        ("logit_bias", biased),
    ):
        if ids and max(ids) >= vocab_size:
            raise BadRequest(f"token id {max(ids)} is outside the vocabulary of {vocab_size}", param=param)


async def _bad_words(words: Sequence[str], text: ModelText) -> tuple[tuple[int, ...], ...]:
    """The token sequences that write the words."""
    found = await text.ids_of_words(words) if words else []
    for place, ids in enumerate(found):
        if max(map(len, ids), default=0) > MAX_BAD_WORD_TOKENS:
            param = f"bad_words.{place}"
            raise BadRequest(f"{param} has more than {MAX_BAD_WORD_TOKENS} tokens", param=param)
    return tuple({each: None for ids in found for each in ids})


def _sampling(
    request: ParsedRequest, text: ModelText, bad_words: tuple[tuple[int, ...], ...], max_tokens: int
) -> SamplingSpec:
    """The parameters of one prompt's answers, the seed still open: the client's, else the model's, else OpenAI's."""
    asked = request.sampling
    if (asked.min_tokens or 0) > max_tokens:
        raise BadRequest(
            f"min_tokens is {asked.min_tokens}, but only {max_tokens} tokens can follow", param="min_tokens"
        )
    wanted = [each for each in (asked.prompt_logprobs, request.echo_logprobs) if each is not None]
    given = {name: value for name in _BY_NAME if (value := getattr(asked, name)) is not None}
    converted = {
        "top_k": max(0, text.defaults.top_k if asked.top_k is None else asked.top_k),
        "max_tokens": max_tokens,
        "logit_bias": tuple(sorted((int(token), bias) for token, bias in (asked.logit_bias or {}).items())),
        "stop_token_ids": tuple(sorted({*(() if asked.ignore_eos else text.eos_ids), *(asked.stop_token_ids or ())})),
        "allowed_token_ids": tuple(sorted(set(asked.allowed_token_ids or ()))),
        "bad_words": bad_words,
        "logprobs": request.top_logprobs is not None,
        "top_logprobs": request.top_logprobs or 0,
        "prompt_logprobs": max(wanted) if wanted else None,
    }
    if asked.top_p == 0:  # the likeliest token alone; a share of 0 would be none
        converted |= {"top_k": 1, "top_p": 1.0}
    sampling = SamplingSpec(**{**dataclasses.asdict(text.defaults), **given, **converted})
    _check_drawable(sampling, text.vocab_size)
    return sampling


def _check_drawable(sampling: SamplingSpec, vocab_size: int) -> None:
    """Raises BadRequest where at some position no token may be left."""
    allowed, bad_words = sampling.allowed_token_ids, sampling.bad_words
    if not (allowed or bad_words):
        return
    forbidden = {word[-1] for word in bad_words}
    if sampling.min_tokens:
        forbidden.update(sampling.stop_token_ids)
    if len(forbidden) >= vocab_size or (allowed and forbidden.issuperset(allowed)):
        param = "allowed_token_ids" if allowed else "bad_words"
        raise BadRequest("bad_words and min_tokens may forbid all tokens that are allowed", param=param)


def _max_tokens(request: ParsedRequest, settings: AppSettings, prompt_len: int, max_model_len: int) -> int:
    fits, asked, least = max_model_len - prompt_len, request.max_tokens, request.sampling.min_tokens or 0
    if asked is not None and request.ends_with_context:
        asked = min(asked, max(fits, 1))
    if fits < 1 or (asked is not None and asked > fits):
        param = request.prompt_param
        answer = f" and {asked} in the completion" if asked is not None else ""
        raise BadRequest(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {prompt_len} "
            f"tokens in the {param}{answer}. Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )
    if asked is not None:
        return asked
    return fits if request.messages else min(fits, max(settings.default_completion_tokens, least))
