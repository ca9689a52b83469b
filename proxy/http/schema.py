"""OpenAI's request bodies, and the only place that knows them: bytes in, a checked `ParsedRequest` of plain values out.

The rule for parameters:
  * the ones that have fields here are obeyed, and checked strictly (no "5" for 5, no NaN); null means "not given";
  * what `parameters` knows is ignored, or refused where it asks for something that this server does not have;
  * every other name is reported in `ParsedRequest.unknown`; one that is nearly a known name (`temprature`) is refused.
Transfer parameters of other servers are thereby never taken from a client. Knows no tokenizer and no HTTP.
Source: the OpenAI API reference (completions, chat), and vLLM's extra parameters.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.node.messages.base import MAX_TOKENS
from baton.node.messages.control import MAX_ALLOWED_TOKENS, MAX_PRIORITY
from baton.proxy.http import structured
from baton.proxy.http.messages import (
    CalledFunction,
    ChatMessage,
    TextPart,
    ToolCall,
    conversation,
    unknown_in_messages,
)
from baton.proxy.http.parameters import MAX_NAME_CHARS, MAX_UNKNOWN, check_spelling, unknown_parameters
from baton.proxy.http.parsing import Body, parse_body
from baton.proxy.http.structured import StructuredFields, grammar_request
from baton.proxy.http.template_options import Effort, TemplateRequest, render_options
from baton.proxy.http.tools import DeclaredFunction, DeclaredTool, ToolFields, ToolRequest, tool_request
from baton.proxy.text.grammar_request import GrammarRequest
from baton.proxy.text.template import NEXT_MESSAGE, RenderOptions

MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_SALT_CHARS = 1024
MAX_BAD_WORDS = 64
MAX_BAD_WORD_CHARS = 256
MAX_MESSAGES = 10_000
MAX_PROMPTS = 4096


def _whole(value: object) -> object:
    """JSON has one type of numbers: 4.0 is 4. Languages without integers write it so."""
    return int(value) if type(value) is float and value.is_integer() else value


def _whole_list(value: object) -> object:
    """As `_whole`, at once for a list of numbers: a call for each of a million would take a second."""
    if not isinstance(value, list) or not {int, float}.issuperset(map(type, value)):
        return value
    try:
        whole = list(map(int, value))
    except OverflowError:  # an infinity
        return value
    return whole if whole == value else value


def _few_biases(value: object) -> object:
    """Counted first: pydantic checks a whole object, and makes an error of each entry, before it counts them."""
    if isinstance(value, dict) and len(value) > MAX_LOGIT_BIAS:
        raise ValueError("too many")
    return value


Whole = Annotated[int, BeforeValidator(_whole)]
_Ids = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(max_length=MAX_TOKENS, fail_fast=True)]
TokenIds = Annotated[_Ids | Annotated[_Ids, BeforeValidator(_whole_list)], Field(union_mode="left_to_right")]
"""The second form makes Python objects of all ids twice, and is only tried where the first one fails."""
Key = Annotated[str, Field(max_length=4096)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: each chunk has the usage so far of its choice; only together with include_usage."""
    include_obfuscation: bool | None = None
    """OpenAI's padding against traffic analysis; accepted, never sent."""


class SamplingRequest(_Strict):
    """How the client wants tokens to be drawn; null means that the model's default counts.

    A field of the name of one of `SamplingSpec` reaches the workers by that name, without further code here.
    """

    min_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKENS)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=100.0)] | None = None
    top_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    seed: Annotated[Whole, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0.0, le=100.0)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,9})$")], Annotated[float, Field(ge=-100.0, le=100.0)]],
            BeforeValidator(_few_biases),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    allowed_token_ids: Annotated[TokenIds, Field(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    bad_words: Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS, fail_fast=True)] | None = None
    prompt_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None


class Prediction(_Strict):
    """OpenAI's predicted outputs: text that much of the answer may be."""

    type: Literal["content"]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Body(SamplingRequest, StructuredFields):
    """What both endpoints share; undeclared names are checked by `parameters`."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, frozen=True)

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    max_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=0, le=MAX_TOKENS)] | None = None
    truncate_prompt_tokens: Annotated[Whole, Field(ge=-1, le=MAX_TOKENS)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    n: Annotated[Whole, Field(ge=1, le=1 << 16)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOP_STRINGS, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: Annotated[Whole, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = None
    session_id: Key | None = None
    prompt_cache_key: Key | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT_CHARS)] | None = None
    user: Key | None = None
    speculative: bool | None = None
    """false: no tokens of the answer are guessed."""
    prediction: Prediction | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class CompletionBody(_Body):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    add_special_tokens: bool | None = None
    best_of: Annotated[Whole, Field(ge=1, le=1 << 16)] | None = None
    echo: bool | None = None
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None


class ChatBody(_Body, TemplateRequest, ToolFields):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    thinking_token_budget: Annotated[Whole, Field(ge=-1, le=MAX_TOKENS)] | None = None
    """vLLM's; -1: none."""


_FIELD_NAMES = frozenset(
    name
    for model in (
        *(CompletionBody, ChatBody, Prediction, StreamOptions, ChatMessage, TextPart, ToolCall, CalledFunction),
        *(DeclaredTool, DeclaredFunction),
    )
    for name in model.model_fields
).union(structured.FIELD_NAMES)
STOP_SHAPE = f"must be a string or an array of at most {MAX_STOP_STRINGS} strings of 1 to {MAX_STOP_CHARS} characters"
_SHAPES = {
    "prompt": (
        "must be a string, an array of strings, an array of token ids, or an array of such arrays, "
        f"of at most {MAX_PROMPTS} prompts"
    ),
    "stop": STOP_SHAPE,
    "content": "must be a string or an array of text parts; images, audio and files are not supported",
    "logit_bias": f"must map at most {MAX_LOGIT_BIAS} token ids, written as strings, to numbers from -100 to 100",
}
"""Errors in place of pydantic's for values that may have several shapes."""


@dataclass(frozen=True, slots=True)
class StopRule:
    """The client's stop strings."""

    strings: tuple[str, ...]
    include: bool
    """Keep the string, or token, that stopped the text in it."""


@dataclass(frozen=True, slots=True)
class IdRule:
    """Where the client wants token ids."""

    show: bool
    """The answer has the token ids of prompt and choices (`return_token_ids`)."""
    logprobs_by_id: bool
    """Tokens of log probabilities are written as "token_id:5" instead of text (`return_tokens_as_token_ids`)."""


@dataclass(frozen=True, slots=True)
class Truncation:
    """A prompt that is too long is cut."""

    num_tokens: int | None
    """So many tokens are kept; None: as many as leave room for the answer."""
    keep_first: bool
    """Else the last ones are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """One request, checked as far as it can be without the model: prompts are still text, or ids of any size."""

    model: str
    prompts: tuple[str | tuple[int, ...], ...] = ()
    """Of a completion; empty for a chat."""
    messages: tuple[Mapping[str, Any], ...] = ()
    """Of a chat; empty for a completion."""
    prompt_param: str = "messages"
    """The parameter that the prompt comes from, for errors."""
    render: RenderOptions = NEXT_MESSAGE
    tools: ToolRequest | None = None
    """Of a chat; the answer of a completion is text, whatever the model marks in it."""
    shows_reasoning: bool = True
    """The answer has the model's reasoning."""
    max_reasoning: int | None = None
    """Tokens of reasoning behind which its end is drawn; None: any number."""
    add_special_tokens: bool = False
    sampling: SamplingRequest
    max_tokens: int | None
    ends_with_context: bool = False
    """An answer for whose max_tokens the context has no room is shorter; else the request is refused."""
    top_logprobs: int | None
    """Alternatives beside each token's log probability; None: no log probabilities."""
    n: int
    stop: StopRule
    echo: bool = False
    skip_special_tokens: bool
    """Special tokens are no part of an answer's text."""
    ids: IdRule
    stream: bool
    include_usage: bool
    continuous_usage: bool
    """Each chunk has the usage so far of its choice, where include_usage is set."""
    truncation: Truncation | None
    priority: int
    """Higher is served first; in the body, as in vLLM, lower is."""
    cache_salt: str
    """Only requests of the same salt share KV; empty: those that give none."""
    unknown: tuple[str, ...]
    """Parameters that mean nothing to this server, at most MAX_UNKNOWN of them."""
    grammar: GrammarRequest | None
    """The form that answers must have."""
    speculate: bool = True
    """Tokens of the answer may be guessed, and verified several at a time."""
    prediction: str | None = None
    """Text that the answer may be; None: the client predicts nothing."""
    session_key: bytes
    """Digest of the client's name for its conversation or itself, for the policy `session`; empty: it gave none."""

    @property
    def echo_logprobs(self) -> int | None:
        """Alternatives beside the log probability of each token of the prompt that the answer repeats; None: none."""
        return self.top_logprobs if self.echo else None


def read_completion(body: bytes) -> ParsedRequest:
    """The request in the body of /v1/completions; raises BadRequest."""
    request = parse(CompletionBody, body)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise BadRequest("best_of is only supported where it equals n", param="best_of")
    return ParsedRequest(
        **_shared(request, shows_prompt=bool(request.echo)),
        prompts=_prompts(request.prompt),
        prompt_param="prompt",
        add_special_tokens=request.add_special_tokens is not False,
        top_logprobs=request.logprobs,
        echo=bool(request.echo),
    )


def read_chat(body: bytes) -> ParsedRequest:
    """The request in the body of /v1/chat/completions; raises BadRequest."""
    request = parse(ChatBody, body)
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    tools = tool_request(request)
    if tools.schemas and request.prediction is not None:
        raise BadRequest("prediction is not available beside tools", param="prediction")
    return ParsedRequest(
        **_shared(request, shows_prompt=False),
        messages=conversation(request.messages),
        render=render_options(request, tools.shown, request.reasoning_effort),
        tools=tools,
        shows_reasoning=request.include_reasoning is not False,
        max_reasoning=None if request.thinking_token_budget == -1 else request.thinking_token_budget,
        top_logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def _prediction(request: _Body) -> str | None:
    """As in OpenAI's API there is one answer to a prediction."""
    if request.prediction is None:
        return None
    if (request.n or 1) > 1:
        raise BadRequest("prediction is not available where n is more than 1", param="prediction")
    return request.prediction.text


def parse(model: type[Body], body: bytes) -> Body:
    """`body` as `model`; BadRequest names the first parameter that is wrong, and never repeats its value."""
    return parse_body(model, body, _FIELD_NAMES, _SHAPES)


def _shared(request: _Body, *, shows_prompt: bool) -> dict[str, Any]:
    """The fields of a ParsedRequest that do not depend on the endpoint; `shows_prompt`: the answer repeats it."""
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    if request.max_tokens not in (None, max_tokens):
        raise BadRequest("max_tokens and max_completion_tokens contradict each other", param="max_tokens")
    if request.prompt_logprobs is not None and request.stream:
        raise BadRequest("prompt_logprobs is not available where stream is true", param="prompt_logprobs")
    if max_tokens == 0 and not shows_prompt and request.prompt_logprobs is None:
        param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        raise BadRequest(f"{param} may be 0 only together with echo or prompt_logprobs", param=param)
    options = request.stream_options
    if options is not None and not request.stream and (options.include_usage or options.model_extra):
        raise BadRequest("stream_options needs stream to be true", param="stream_options")
    if max_tokens is not None and (request.min_tokens or 0) > max_tokens:
        raise BadRequest("min_tokens is greater than max_tokens", param="min_tokens")
    return {
        "model": request.model,
        "sampling": SamplingRequest.model_construct(
            **{name: getattr(request, name) for name in SamplingRequest.model_fields}
        ),
        "max_tokens": max_tokens,
        "n": request.n or 1,
        "stop": StopRule(
            (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ()),
            bool(request.include_stop_str_in_output),
        ),
        "skip_special_tokens": request.skip_special_tokens is not False,
        "ids": IdRule(bool(request.return_token_ids), bool(request.return_tokens_as_token_ids)),
        "stream": bool(request.stream),
        "include_usage": bool(request.stream_options and request.stream_options.include_usage),
        "continuous_usage": bool(request.stream_options and request.stream_options.continuous_usage_stats),
        "truncation": _truncation(request),
        "priority": -(request.priority or 0),
        "cache_salt": request.cache_salt or "",
        "unknown": _unknown(request),
        "grammar": _grammar(request),
        "speculate": request.speculative is not False,
        "prediction": _prediction(request),
        "session_key": session_digest(request.prompt_cache_key or request.session_id or request.user or ""),
    }


def _grammar(request: _Body) -> GrammarRequest | None:
    asked = grammar_request(request)
    if asked is not None:
        check_beside_grammar(request)
    return asked


def check_beside_grammar(request: SamplingRequest, where: str = "where an answer has a given form") -> None:
    """Raises BadRequest beside parameters that may leave no token to draw, or no end."""
    for name in ("ignore_eos", "allowed_token_ids", "bad_words"):
        if getattr(request, name):
            raise BadRequest(f"{name} is not available {where}", param=name)


def _truncation(request: _Body) -> Truncation | None:
    asked = request.truncate_prompt_tokens
    if asked is None:
        return None
    if asked == 0:
        raise BadRequest("truncate_prompt_tokens must be -1 or at least 1", param="truncate_prompt_tokens")
    return Truncation(None if asked < 0 else asked, request.truncation_side == "right")


def _unknown(request: _Body) -> tuple[str, ...]:
    """Raises BadRequest for parameters that are not supported, or misspelt."""
    found = list(unknown_parameters(request.model_extra or {}, type(request).model_fields))
    for name in itertools.islice((request.stream_options and request.stream_options.model_extra) or (), MAX_UNKNOWN):
        check_spelling(name, StreamOptions.model_fields, parent="stream_options")
        found.append(f"stream_options.{name[:MAX_NAME_CHARS]}")
    if isinstance(request, ChatBody):
        found += unknown_in_messages(request.messages, MAX_UNKNOWN)
    return tuple(dict.fromkeys(found))[:MAX_UNKNOWN]


def session_digest(key: str) -> bytes:
    """16 bytes; a key may name a person, and goes no further than here. None of an empty key."""
    return hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=16).digest() if key else b""


def _prompts(prompt: str | list[int] | list[str] | list[list[int]]) -> tuple[str | tuple[int, ...], ...]:
    if isinstance(prompt, str):
        return (prompt,)
    if not prompt:
        raise BadRequest("prompt is empty", param="prompt")
    if isinstance(prompt[0], int):
        return (tuple(prompt),)  # type: ignore[arg-type]  # a list of one type, as parsed
    return tuple(entry if isinstance(entry, str) else tuple(entry) for entry in prompt)  # type: ignore[arg-type]
