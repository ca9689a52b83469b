"""The exceptions by which msgspec refuses bytes. Text that is not UTF-8, or cannot be, is not among its own."""

from __future__ import annotations

import msgspec

DECODE_ERRORS = (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError)
