"""Guards node.messages: messages survive a round trip, and any other bytes raise BadMessage and nothing else.

Strategies are derived from the types (msgspec.inspect), so that new messages and fields are covered automatically.
"""

from __future__ import annotations

import math
from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baton.node.messages.base import MAX_BODY_BYTES, MAX_TOKENS, BadMessage, Message, encode
from baton.node.messages.control import Cancel, Drain, SamplingSpec
from baton.node.messages.wire import MESSAGES, decode

MAX_ITEMS = 4
pack = msgspec.msgpack.encode


def length(kind: Any) -> dict[str, int]:
    """Bounds of a container, narrowed so that examples stay small."""
    low = kind.min_length or 0
    return {"min_size": low, "max_size": max(low, min(MAX_ITEMS, kind.max_length or MAX_ITEMS))}


def integers(kind: inspect.IntType) -> st.SearchStrategy[Any]:
    assert kind.ge is not None and kind.le is not None, "every integer of the wire has both bounds"
    return st.integers(kind.ge, kind.le) | st.sampled_from([kind.ge, kind.le])


def floats(kind: inspect.FloatType) -> st.SearchStrategy[Any]:
    low, high = (kind.ge if kind.ge is not None else kind.gt), (kind.le if kind.le is not None else kind.lt)
    return st.floats(low, high, exclude_min=kind.gt is not None, exclude_max=kind.lt is not None, allow_nan=False)


def texts(kind: inspect.StrType) -> st.SearchStrategy[Any]:
    assert kind.max_length is not None, "every text of the wire has a bound"
    return st.text(**length(kind))


def binaries(kind: inspect.BytesType) -> st.SearchStrategy[Any]:
    assert kind.max_length is not None, "all bytes of the wire have a bound"
    return st.binary(min_size=kind.min_length or 0, max_size=kind.max_length)


def sequences(kind: inspect.VarTupleType) -> st.SearchStrategy[Any]:
    assert kind.max_length is not None, "every sequence of the wire has a bound"
    return st.lists(values(kind.item_type), **length(kind)).map(tuple)


def mappings(kind: inspect.DictType) -> st.SearchStrategy[Any]:
    assert kind.max_length is not None, "every mapping of the wire has a bound"
    return st.dictionaries(values(kind.key_type), values(kind.value_type), **length(kind))


def structs(kind: inspect.StructType) -> st.SearchStrategy[Any]:
    return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})


MAKERS: dict[type, Any] = {
    inspect.IntType: integers,
    inspect.FloatType: floats,
    inspect.StrType: texts,
    inspect.LiteralType: lambda kind: st.sampled_from(kind.values),
    inspect.BytesType: binaries,
    inspect.BoolType: lambda kind: st.booleans(),
    inspect.NoneType: lambda kind: st.none(),
    inspect.VarTupleType: sequences,
    inspect.TupleType: lambda kind: st.tuples(*map(values, kind.item_types)),
    inspect.DictType: mappings,
    inspect.StructType: structs,
    inspect.UnionType: lambda kind: st.one_of(*map(values, kind.types)),
}


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Valid values of a msgspec type; a KeyError means a field type that this file does not cover yet."""
    kind = kind.type if isinstance(kind, inspect.Metadata) else kind
    strategy: st.SearchStrategy[Any] = MAKERS[type(kind)](kind)
    return strategy


EACH: dict[type[Message], st.SearchStrategy[Message]] = {cls: values(inspect.type_info(cls)) for cls in MESSAGES}
ANY: st.SearchStrategy[Message] = st.one_of(*EACH.values())


def is_refused_or_whole(body: bytes) -> bool:
    """Whether `body` raises BadMessage or decodes to a message that survives a round trip."""
    try:
        message = decode(body)
    except BadMessage:
        return True
    # Compared as bytes: a mutation may turn an unbounded float into a NaN.
    return isinstance(message, MESSAGES) and encode(decode(encode(message))) == encode(message)


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_messages_survive_a_round_trip(cls: type[Message]) -> None:
    """Guards exactness: a field lost or changed in encoding (an empty tuple, an extreme count) is silent."""

    @settings(max_examples=40)
    @given(EACH[cls])
    def check(message: Message) -> None:
        arrived = decode(encode(message))
        assert type(arrived) is cls and arrived == message

    check()


def test_every_message_class_is_in_the_table() -> None:
    """Guards against a message that can be sent but that every decoder rejects."""
    ours = {"baton.node.messages.control", "baton.node.messages.transfer"}
    assert {cls for cls in Message.__subclasses__() if cls.__module__ in ours} == set(MESSAGES)
    assert len({cls.__struct_config__.tag for cls in MESSAGES}) == len(MESSAGES)


@given(ANY, st.data())
def test_flipped_bits_are_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    """Guards the worker's loop: another exception out of `decode` would end it and lose all requests."""
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert is_refused_or_whole(bytes(body))


@given(ANY, st.data())
def test_a_truncated_message_is_refused(message: Message, data: st.DataObject) -> None:
    """Guards against taking a prefix of a message for a message."""
    body = encode(message)
    with pytest.raises(BadMessage):
        decode(body[: data.draw(st.integers(0, len(body) - 1))])


@given(ANY, st.binary(min_size=1, max_size=8))
def test_trailing_bytes_are_refused(message: Message, more: bytes) -> None:
    """Guards against silently dropping a second message in the same frame."""
    with pytest.raises(BadMessage):
        decode(encode(message) + more)


@given(ANY, st.data())
def test_a_spliced_message_is_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    """Guards against shifted length bytes, which cause huge allocations or unexpected types."""
    body = encode(message)
    at = data.draw(st.integers(0, len(body)))
    assert is_refused_or_whole(body[:at] + data.draw(st.binary(min_size=1, max_size=6)) + body[at:])


@given(st.binary(max_size=200))
def test_random_bytes_are_a_message_or_refused(body: bytes) -> None:
    """Guards against arbitrary input from an untrusted peer."""
    assert is_refused_or_whole(body)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@given(ANY, st.data(), JUNK)
def test_a_field_of_any_other_value_is_a_message_or_refused(message: Message, data: st.DataObject, junk: Any) -> None:
    """Guards against well-formed MessagePack of the wrong shape getting past the decoder."""
    fields = msgspec.msgpack.decode(encode(message))
    fields[data.draw(st.sampled_from(sorted(fields)))] = junk
    assert is_refused_or_whole(pack(fields))


SAMPLING: dict[str, Any] = {"max_tokens": 1}


def filled(cls: type[Message], **fields: Any) -> dict[str, Any]:
    """A valid message as plain values, with some replaced."""
    message = msgspec.convert(SHORTEST[cls], cls)
    return {**msgspec.to_builtins(message, builtin_types=(bytes,)), **fields}


def prefill_with(**body: Any) -> dict[str, Any]:
    """A valid Prefill as plain values, with fields of its body replaced."""
    fields = filled(BY_NAME["Prefill"])
    return fields | {"body": fields["body"] | body}


def shortest(kind: Any) -> Any:
    """A small valid value of a type, for messages whose other fields do not matter."""
    kind = kind.type if isinstance(kind, inspect.Metadata) else kind
    match kind:
        case inspect.IntType():
            return kind.ge
        case inspect.FloatType():
            return 1.0
        case inspect.StrType():
            return "x" * (kind.min_length or 0)
        case inspect.LiteralType():
            return kind.values[0]
        case inspect.BytesType():
            return bytes(kind.min_length or 0)
        case inspect.VarTupleType():
            return [shortest(kind.item_type)] * (kind.min_length or 0)
        case inspect.StructType():
            fields = {field.encode_name: shortest(field.type) for field in kind.fields if field.required}
            if kind.array_like:
                return list(fields.values())
            return fields | ({kind.tag_field: kind.tag} if kind.tag_field else {})
        case inspect.BoolType():
            return False
    raise AssertionError(f"no short value of {kind}")


SHORTEST: dict[type[Message], Any] = {cls: shortest(inspect.type_info(cls)) for cls in MESSAGES}
BY_NAME: dict[str, type[Message]] = {cls.__name__: cls for cls in MESSAGES}


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_an_unknown_field_is_refused_in_every_message(cls: type[Message]) -> None:
    """Guards against silently ignoring a field of another protocol version."""
    assert type(decode(pack(filled(cls)))) is cls
    with pytest.raises(BadMessage, match="unknown field"):
        decode(pack(filled(cls, extra=1)))


@pytest.mark.parametrize("cls", MESSAGES, ids=lambda cls: cls.__name__)
def test_a_missing_field_is_refused_in_every_message(cls: type[Message]) -> None:
    """Guards against a default silently replacing a missing required field."""
    for field in msgspec.structs.fields(cls):
        if field.required:
            fields = filled(cls)
            del fields[field.name]
            with pytest.raises(BadMessage, match=field.name):
                decode(pack(fields))


@pytest.mark.parametrize("tag", ["Nope", "", "cancel", "Message", "x" * 100_000, 1, None, ["Cancel"], b"Cancel"])
def test_an_unknown_tag_is_refused(tag: object) -> None:
    """Guards against decoding a message of another protocol version."""
    with pytest.raises(BadMessage):
        decode(pack({"t": tag, "request_id": "r", "attempt": 0}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_sampling_parameter_is_nan_or_infinite(value: float) -> None:
    """Guards the sampling kernel against NaN, which compares false with every bound and passes a naive check."""
    kind: Any = inspect.type_info(SamplingSpec)
    names = [field.name for field in kind.fields if isinstance(field.type, inspect.FloatType)]
    assert "temperature" in names and len(names) >= 6
    for parameter in names:
        with pytest.raises(BadMessage, match=parameter):
            decode(pack(prefill_with(sampling=SAMPLING | {parameter: value})))
    with pytest.raises(BadMessage, match="logit_bias"):
        decode(pack(prefill_with(sampling=SAMPLING | {"logit_bias": [[1, value]]})))
    with pytest.raises(BadMessage, match="deadline_s"):
        decode(pack(prefill_with(deadline_s=value)))


@pytest.mark.parametrize(
    "fields",
    [
        {"token_ids": [2**31]},
        {"token_ids": [-1]},
        {"token_ids": [0] * (MAX_TOKENS + 1)},
        {"token_ids": [True]},
        {"token_ids": [1.0]},
        {"token_ids": "1"},
        {"block_hashes": [b"x" * 33]},
        {"sampling": SAMPLING | {"max_tokens": -1}},
        {"sampling": SAMPLING | {"prompt_logprobs": 21}},
        {"sampling": SAMPLING | {"top_p": 0.0}},
        {"sampling": SAMPLING | {"temperature": "1"}},
        {"sampling": SAMPLING | {"allowed_token_ids": [0] * 1025}},
        {"sampling": SAMPLING | {"bad_words": [[1]] * 129}},
        {"sampling": SAMPLING | {"bad_words": [[1] * 33]}},
        {"sampling": SAMPLING | {"bad_words": [[]]}},
        {"sampling": SAMPLING | {"unknown": 1}},
        {"unknown": 1},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_dispatch_body_out_of_bounds_is_refused(fields: dict[str, Any]) -> None:
    """Guards the nested struct: its fields are bounded as those of the enclosing message are."""
    assert decode(pack(prefill_with()))
    with pytest.raises(BadMessage):
        decode(pack(prefill_with(**fields)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Prefill", {"request_id": ""}),
        ("Prefill", {"request_id": "x" * 97}),
        ("Register", {"role": "proxy"}),
        ("Register", {"role": ""}),
        ("Register", {"role": "decode\n"}),
        ("Register", {"namespace": b"x" * 31}),
        ("Register", {"block_tokens": 0}),
        ("Tokens", {"ids": [0] * 65537}),
        ("PromptLogprobs", {"first": 0}),
        ("PromptLogprobs", {"entries": []}),
        ("PromptLogprobs", {"entries": [[-1.0, 1]] * 1025}),
        ("PromptLogprobs", {"entries": [[-1.0, 0]]}),
        ("Tokens", {"finish": "abort"}),
        ("Offer", {"source": [1 << 31]}),
        ("Ack", {"transfer_id": b"x" * 15}),
        ("Ack", {"transfer_id": "x" * 16}),
        ("Ping", {"incarnation": 2**64 - 1}),
        ("Ping", {"incarnation": -1}),
        ("Refused", {"reason": "x" * 4097}),
    ],
)
def test_a_value_out_of_bounds_is_refused(name: str, fields: dict[str, Any]) -> None:
    """Guards against an index past a tensor, a negative count, an unbounded text."""
    with pytest.raises(BadMessage):
        decode(pack(filled(BY_NAME[name], **fields)))


def test_duplicate_keys_take_the_last_value_and_duplicate_tags_are_refused() -> None:
    """Guards against ambiguous frames: every process decodes a duplicate key in the same way."""
    start = b"\x84" + pack("t") + pack("Cancel") + pack("request_id") + pack("a") + pack("attempt") + pack(1)
    assert decode(start + pack("request_id") + pack("b")) == Cancel(request_id="b", attempt=1)
    with pytest.raises(BadMessage):
        decode(start + pack("attempt") + pack(-1))
    with pytest.raises(BadMessage):
        decode(start + pack("t") + pack("Cancelled"))


HUGE = {"array": b"\xdd\xff\xff\xff\xff", "map": b"\xdf\xff\xff\xff\xff", "bin": b"\xc6\xff\xff\xff\xff"}


@pytest.mark.parametrize(
    "body",
    [
        b"\x91" * 200_000 + b"\xc0",
        b"\x81\xa1a" * 100_000 + b"\xc0",
        b"\x81" + pack("t") + b"\x91" * 200_000 + b"\xc0",
        b"\x82" + pack("x") + b"\x91" * 200_000 + b"\xc0" + pack("t") + pack("Drain"),
        *HUGE.values(),
        *(
            b"\x82" + pack("t") + pack("Prefill") + pack("body") + b"\x81" + pack("token_ids") + length
            for length in HUGE.values()
        ),
        *(b"\x82" + pack("t") + pack("Ack") + pack("transfer_id") + length for length in HUGE.values()),
        *(b"\x82" + pack("x") + length + pack("t") + pack("Drain") for length in HUGE.values()),
        b"\x82" + pack("t") + pack("Refused") + pack("reason") + b"\xa2\xff\xfe",
        b"\x82" + pack("t") + pack("Refused") + pack("reason") + b"\xa3\xed\xa0\x80",
        b"\x82" + pack("t") + pack("Refused") + pack("reason") + b"\xd4\x01\x00",
        b"\x82" + pack("t") + pack("Refused") + pack("reason") + b"\xd6\xff\x00\x00\x00\x00",
        b"\xc1",
        b"",
    ],
    ids=lambda body: body[:24].hex() + f"-{len(body)}",
)
def test_nesting_false_lengths_bad_text_and_extension_types_are_refused(body: bytes) -> None:
    """Guards against stack overflow, a 4 GB length in a 5-byte frame, and extension decoders."""
    with pytest.raises(BadMessage):
        decode(body)


def test_an_oversized_frame_is_refused_before_decoding() -> None:
    """Guards decoding time and memory, which the frame's size bounds."""
    with pytest.raises(BadMessage, match="at most"):
        decode(encode(Drain()) + bytes(MAX_BODY_BYTES))


@given(ANY)
@example(Drain())
def test_a_view_of_a_frame_decodes_like_bytes(message: Message) -> None:
    """Guards against decoded messages that keep, or share memory with, the memoryview of a socket."""
    frame = bytearray(encode(message))
    arrived = decode(memoryview(frame))
    frame[:] = bytes(len(frame))
    assert arrived == message


def test_the_error_is_short_for_any_frame() -> None:
    """Guards log lines and the `reason` fields of messages, which carry the error."""
    with pytest.raises(BadMessage) as caught:
        decode(pack({"t": "x" * 1_000_000}))
    assert len(str(caught.value)) <= 300
