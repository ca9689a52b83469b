"""Guards the header and the check of a record: any change of any bit shows, and says what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.store.disk.base import Miss
from baton.kvtransfer.store.disk.record import (
    HEADER_BYTES,
    check_namespace,
    check_record,
    pack_header,
    parse_header,
)
from baton.kvtransfer.store.disk.records import RecordFault
from baton.node.errors import SettingsError
from baton.tests.unit.kvtransfer.store.disk.tier_checks import NAMESPACE, block, digest, key

PAYLOAD = block(1, 512)
HEADER = pack_header(NAMESPACE, key(1), 77, PAYLOAD, digest(1))


def miss_of(header: bytes, payload: memoryview = PAYLOAD, namespace: bytes = NAMESPACE, number: int = 1) -> Miss:
    with pytest.raises(RecordFault) as caught:
        check_record(header, payload, namespace, key(number))
    return caught.value.miss


def test_a_record_is_read_as_it_was_written() -> None:
    """Guards against a check that never passes."""
    assert len(HEADER) == HEADER_BYTES
    assert check_record(HEADER, PAYLOAD, NAMESPACE, key(1)) == digest(1)
    parsed = parse_header(HEADER, NAMESPACE)
    assert (parsed.key, parsed.payload_bytes, parsed.tick, parsed.digest) == (key(1), 512, 77, digest(1))


def test_each_fault_has_its_name() -> None:
    """Guards the reasons that operators see."""
    assert miss_of(HEADER, namespace=bytes(32)) is Miss.FOREIGN
    assert miss_of(HEADER, number=2) is Miss.CORRUPT
    assert miss_of(HEADER, PAYLOAD[:-1]) is Miss.CORRUPT
    assert miss_of(HEADER[:-1]) is Miss.TRUNCATED
    assert miss_of(b"") is Miss.TRUNCATED
    assert miss_of(bytes(HEADER_BYTES)) is Miss.CORRUPT
    assert miss_of(HEADER[:4] + b"\1" + HEADER[5:]) is Miss.CORRUPT  # an older format, without the block's digest


@given(st.integers(0, 8 * (HEADER_BYTES + 512) - 1))
def test_any_flipped_bit_shows(bit: int) -> None:
    """Guards against a field that no digest covers."""
    record = bytearray(HEADER + bytes(PAYLOAD))
    record[bit // 8] ^= 1 << bit % 8
    assert miss_of(bytes(record[:HEADER_BYTES]), memoryview(record)[HEADER_BYTES:]) in (Miss.CORRUPT, Miss.FOREIGN)


@given(st.binary(max_size=200))
def test_garbage_is_no_record(garbage: bytes) -> None:
    """Guards the parser against whatever lies on a disk."""
    assert miss_of(garbage) in (Miss.CORRUPT, Miss.TRUNCATED)


def test_a_namespace_is_a_digest() -> None:
    """Guards against a name that is too short to tell namespaces apart."""
    with pytest.raises(SettingsError, match="not 5"):
        check_namespace(b"llama")
