"""Guards node.messages.store: messages survive a round trip, other bytes are refused, the two unions are disjoint."""

from __future__ import annotations

import msgspec.inspect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.node.messages.base import BadMessage, Message, encode
from baton.node.messages.control import Ping
from baton.node.messages.store import STORE_MESSAGES, Beat, decode_store
from baton.node.messages.wire import MESSAGES, decode
from baton.tests.unit.node.test_messages import values


def _any_of(cls: type[Message]) -> st.SearchStrategy[Message]:
    return values(msgspec.inspect.type_info(cls))


ANY = st.sampled_from(STORE_MESSAGES).flatmap(_any_of)


@pytest.mark.parametrize("cls", STORE_MESSAGES, ids=lambda cls: cls.__name__)
def test_messages_survive_a_round_trip(cls: type[Message]) -> None:
    """Guards against field bounds that reject what a sender may send."""

    @given(_any_of(cls))
    def check(message: Message) -> None:
        assert decode_store(encode(message)) == message

    check()


def test_every_message_class_is_in_the_table() -> None:
    """Guards against a message that can be sent but that every decoder rejects."""
    assert {cls for cls in Message.__subclasses__() if cls.__module__ == Beat.__module__} == set(STORE_MESSAGES)
    tags = [cls.__struct_config__.tag for cls in (*MESSAGES, *STORE_MESSAGES)]
    assert len(set(tags)) == len(tags)


def test_the_unions_are_disjoint() -> None:
    """Guards against a store that accepts a proxy's messages, and a worker that accepts a store's as a proxy's."""
    with pytest.raises(BadMessage):
        decode(encode(Beat()))
    with pytest.raises(BadMessage):
        decode_store(encode(Ping(proxy="p", incarnation=1)))


@given(ANY, st.data())
def test_flipped_bits_are_a_message_or_refused(message: Message, data: st.DataObject) -> None:
    """Guards the store: another exception out of the decoder would end it."""
    body = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decode_store(bytes(body))
    except BadMessage:
        pass
