"""What a model's output consists of: events that the machine makes of tokens, in the order of the tokens.

The texts of neighbouring events of one kind are one text, cut anywhere. Knows no format.
"""

from __future__ import annotations

import hashlib
import string
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ContentText:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningText:
    """Text of the reasoning before the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    """Call `index` of the answer is one of the declared function `name`."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the arguments of call `index`; all of them joined are one JSON text, unless the call is broken."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """Call `index` is over; `broken` if the model left it unfinished, or wrote what the format does not allow."""

    index: int
    broken: bool = False


FormatEvent = ContentText | ReasoningText | CallBegin | CallArguments | CallEnd

_ALPHANUMERICS = string.digits + string.ascii_letters


def call_id(request_id: str, choice: int, index: int, *, num_alphanumerics: int = 0) -> str:
    """The id of call `index` of a choice, the same whenever the request is repeated.

    OpenAI's form, or exactly `num_alphanumerics` letters and digits, which some templates insist on.
    """
    digest = hashlib.sha256(f"{request_id}\0{choice}\0{index}".encode(errors="surrogatepass"))
    if not num_alphanumerics:
        return f"call_{digest.hexdigest()[:24]}"
    value = int.from_bytes(digest.digest())
    return "".join(_ALPHANUMERICS[value // 62**place % 62] for place in range(num_alphanumerics))
