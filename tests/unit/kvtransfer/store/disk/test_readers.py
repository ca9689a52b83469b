"""Readers of a tier's keys, counted."""

from __future__ import annotations

from threading import Lock

from baton.kvtransfer.store.disk.readers import Readers

LONG_S, NOW_S = 60.0, 0.0


def test_a_key_is_read_until_its_last_reader_has_ended() -> None:
    """Guards against a record that is removed under the second of two readers."""
    lock = Lock()
    readers = Readers(lock)
    with lock:
        readers.add(b"a")
        readers.add(b"a")
        readers.remove(b"a")
        assert b"a" in readers and len(readers) == 1 and not readers.wait_for_none(NOW_S)
        readers.remove(b"a")
        assert b"a" not in readers and len(readers) == 0 and readers.wait_for_none(LONG_S)
