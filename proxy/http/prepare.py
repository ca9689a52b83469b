"""An order and a model make generations: token ids and sampling parameters, everything checked before any work.

The place where text becomes tokens and the client's silence becomes the model's defaults. Knows no HTTP.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec

from baton.node.errors import BadRequest
from baton.node.messages.control import SamplingParams
from baton.proxy.http.schema import ParsedRequest, SamplingRequest
from baton.proxy.interface import AppSettings
from baton.proxy.text.model_text import ModelText

_SEEDS = 1 << 63


@dataclass(frozen=True, slots=True)
class Generation:
    """One answer to be made; a request has one for each prompt and each of its n."""

    index: int
    """The `index` of its choice in the answer."""
    prompt_ids: tuple[int, ...]
    echo: str
    """Text of the prompt that the answer begins with, mostly empty."""
    sampling: SamplingParams


async def generations(
    order: ParsedRequest, text: ModelText, settings: AppSettings, max_model_len: int
) -> list[Generation]:
    """All generations of `order`, n next to each other for each prompt; raises BadRequest.

    The k-th of n answers gets seed + k, so that a prompt has the same answers alone and in a batch.
    """
    if order.n > settings.max_n:
        raise BadRequest(f"n is {order.n}, at most {settings.max_n} are allowed", param="n")
    if len(order.prompts) > settings.max_prompts:
        raise BadRequest(f"{len(order.prompts)} prompts, at most {settings.max_prompts} are allowed", param="prompt")
    _check_ids(order.wish, text.vocab_size)
    prompts = await _tokenise(order, text, max_model_len)
    made: list[Generation] = []
    for ids, echo in prompts:
        sampling = _sampling(order, text, settings, len(ids), max_model_len)
        for k in range(order.n):
            seed = secrets.randbits(63) if order.wish.seed is None else (order.wish.seed + k) % _SEEDS
            made.append(Generation(len(made), ids, echo, msgspec.structs.replace(sampling, seed=seed)))
    return made


async def _tokenise(order: ParsedRequest, text: ModelText, max_model_len: int) -> list[tuple[tuple[int, ...], str]]:
    """Ids of each prompt, checked, with the text to echo."""
    param = "messages" if order.chat else "prompt"

    async def encode(prompt: str) -> tuple[int, ...]:
        return await text.encode_bounded(
            prompt, add_special_tokens=order.add_special_tokens, max_tokens=max_model_len, param=param
        )

    if order.chat:
        return [(_checked(await encode(text.render(order.messages)), text.vocab_size, param), "")]
    return [await _tokenise_prompt(prompt, order.echo, text, encode) for prompt in order.prompts]


async def _tokenise_prompt(
    prompt: str | tuple[int, ...], echo: bool, text: ModelText, encode: Callable[[str], Awaitable[tuple[int, ...]]]
) -> tuple[tuple[int, ...], str]:
    if isinstance(prompt, str):
        return _checked(await encode(prompt), text.vocab_size, "prompt"), prompt if echo else ""
    ids = _checked(prompt, text.vocab_size, "prompt")
    return ids, text.decode(ids, skip_special_tokens=False) if echo else ""


def _checked(ids: tuple[int, ...], vocab_size: int, param: str) -> tuple[int, ...]:
    if not ids:
        raise BadRequest(f"{param} is empty: there must be at least one token", param=param)
    if max(ids) >= vocab_size:
        raise BadRequest(f"token id {max(ids)} is outside the vocabulary of {vocab_size}", param=param)
    return ids


def _check_ids(wish: SamplingRequest, vocab_size: int) -> None:
    for param, ids in (("stop_token_ids", wish.stop_token_ids), ("logit_bias", [t for t, _ in wish.logit_bias])):
        if ids and max(ids) >= vocab_size:
            raise BadRequest(f"token id {max(ids)} is outside the vocabulary of {vocab_size}", param=param)


def _sampling(
    order: ParsedRequest, text: ModelText, settings: AppSettings, prompt_len: int, max_model_len: int
) -> SamplingParams:
    """The parameters of one prompt's answers, the seed still open."""
    wish, defaults = order.wish, text.defaults
    max_tokens = _max_tokens(order, settings, prompt_len, max_model_len)
    if wish.min_tokens > max_tokens:
        raise BadRequest(
            f"min_tokens is {wish.min_tokens}, but only {max_tokens} tokens can follow", param="min_tokens"
        )
    eos = () if wish.ignore_eos else text.eos_ids
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=wish.min_tokens,
        temperature=_given(wish.temperature, defaults.temperature),
        top_p=_given(wish.top_p, defaults.top_p),
        top_k=defaults.top_k if wish.top_k is None else wish.top_k,
        min_p=_given(wish.min_p, defaults.min_p),
        presence_penalty=wish.presence_penalty,
        frequency_penalty=wish.frequency_penalty,
        repetition_penalty=_given(wish.repetition_penalty, defaults.repetition_penalty),
        logit_bias=wish.logit_bias,
        logprobs=wish.logprobs,
        top_logprobs=wish.top_logprobs,
        stop_token_ids=tuple(sorted({*eos, *wish.stop_token_ids})),
    )


def _max_tokens(order: ParsedRequest, settings: AppSettings, prompt_len: int, max_model_len: int) -> int:
    fits = max_model_len - prompt_len
    asked = order.wish.max_tokens
    if fits < 1 or (asked is not None and asked > fits):
        param = "messages" if order.chat else "prompt"
        answer = f" and {asked} in the completion" if asked is not None else ""
        raise BadRequest(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested {prompt_len} "
            f"tokens in the {param}{answer}. Please reduce the length of the {param} or completion.",
            param=param,
            code="context_length_exceeded",
        )
    default = settings.default_chat_tokens if order.chat else settings.default_completion_tokens
    return asked if asked is not None else min(fits, max(default, order.wish.min_tokens))


def _given(value: float | None, default: float) -> float:
    return default if value is None else value
