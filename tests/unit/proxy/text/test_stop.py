"""Stop strings against the plain definition: the text ends where the first of them is complete."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.proxy.text.stop import StopMatcher

letters = st.text(alphabet="ab", max_size=24)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


def run(matcher: StopMatcher, pieces: list[str]) -> tuple[str, str]:
    """All text that goes out, and what stopped it."""
    out = []
    for piece in pieces:
        text, found = matcher.push(piece)
        out.append(text)
        if found:
            return "".join(out), found
    return "".join(out) + matcher.flush(), ""


def naive(text: str, strings: list[str], include: bool) -> tuple[str, str]:
    """The definition, quadratic: the shortest beginning of `text` that ends with a stop string."""
    for end in range(len(text) + 1):
        matched = [string for string in strings if text[:end].endswith(string)]
        if matched:
            longest = max(matched, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, ""


def cut(text: str, borders: list[int]) -> list[str]:
    places = sorted({0, len(text), *(border % (len(text) + 1) for border in borders)})
    return [text[a:b] for a, b in pairwise(places)]


@settings(max_examples=600)
@given(letters, stops, st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_stops_where_the_definition_says_however_the_text_is_cut(
    text: str, strings: list[str], borders: list[int], include: bool
) -> None:
    """Guards against a stop string missed over a token border, found too late, or found differently when streaming."""
    assert run(StopMatcher(strings, include=include), cut(text, borders)) == naive(text, strings, include)


@settings(max_examples=300)
@given(letters, stops)
def test_what_goes_out_is_never_taken_back_and_never_held_without_reason(text: str, strings: list[str]) -> None:
    """Guards against half a stop string shown to the client, and against text held that cannot become one."""
    matcher, out = StopMatcher(strings), ""
    for end in range(1, len(text) + 1):
        piece, found = matcher.push(text[end - 1])
        out += piece
        if found:
            return
        held = text[len(out) : end]
        assert text[:end] == out + held
        beginnings = {string[:n] for string in strings for n in range(1, len(string))}
        assert held == max((b for b in beginnings if text[:end].endswith(b)), key=len, default="")


@settings(max_examples=300)
@given(letters, stops, st.integers(0, 24), st.booleans())
def test_a_match_may_begin_where_none_counts_yet(text: str, strings: list[str], begin: int, include: bool) -> None:
    """Guards against a stop string missed over the border of min_tokens, or one within it that ends the answer."""
    matcher, out, found = StopMatcher(strings, include=include), "", ""
    for index, char in enumerate(text):
        piece, found = matcher.push(char, early=index < begin)
        out += piece
        if found:
            break
    ends = [e for e in range(min(begin, len(text)) + 1, len(text) + 1) if text[:e].endswith(tuple(strings))]
    if not ends:
        assert (out + matcher.flush(), found) == (text, "")
    else:
        longest = max((string for string in strings if text[: ends[0]].endswith(string)), key=len)
        assert (out, found) == (text[: ends[0] if include else ends[0] - len(longest)], longest)


def test_a_match_may_lie_in_text_that_is_not_shown() -> None:
    """Guards against a stop at a special token that is never seen, and against its text shown where it is none."""
    for include, out in ((False, "y"), (True, "y.<sep>")):
        matcher = StopMatcher([".<sep>", "<sep><sep>"], include=include)
        assert matcher.push("y.") == ("y", "")
        assert matcher.push("<sep>", shown=False) == (out[1:], ".<sep>")
    matcher = StopMatcher(["<sep>x"])
    assert matcher.push("a") == ("a", "")
    assert matcher.push("<sep>", shown=False) == ("", "")
    assert matcher.push("y<s") == ("y", "")
    assert matcher.push("ep>", shown=False) == ("", "")
    assert matcher.flush() == "<s"


def test_without_stop_strings_text_passes() -> None:
    """Guards against text lost or held where no one asked for stops."""
    matcher = StopMatcher(())
    assert matcher.push("abc") == ("abc", "")
    assert matcher.flush() == ""


def test_the_held_end_is_flushed_once() -> None:
    """Guards against the beginning of a stop string that never came being lost, or sent twice."""
    matcher = StopMatcher(["END"])
    assert matcher.push("the E") == ("the ", "")
    assert matcher.push("N") == ("", "")
    assert matcher.flush() == "EN"
    assert matcher.flush() == ""


def test_a_match_may_stay_in_the_text() -> None:
    """Guards against include_stop_str_in_output cutting, or keeping what follows the match."""
    assert StopMatcher(["END"], include=True).push("the END of") == ("the END", "END")
    assert StopMatcher(["END"], include=False).push("the END of") == ("the ", "END")
