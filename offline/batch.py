"""Files of requests in OpenAI's batch format, answered line by line: {"custom_id", "method", "url", "body"} in, a line
{"id", "custom_id", "response", "error"} out, in the order in which the answers come.

A run that was interrupted goes on where it stopped: what the output holds is not asked again. Owns both files; knows no
fields of a body but `model` and `stream`. Source: the OpenAI API reference, "The request input object" of batches.
"""

from __future__ import annotations

import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError
from baton.offline.client import ApiClient, NoAnswer

URLS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
LINES_PER_SYNC = 100
ID_PREFIX = "batch_req_"
_LINE_START = b'{"id":"' + ID_PREFIX.encode()


class _InputLine(msgspec.Struct):
    custom_id: str
    method: str
    url: str
    body: dict[str, Any]


class BatchResponse(msgspec.Struct):
    """The server's answer to one line; a status other than 200 has an error as its body."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, omit_defaults=True):
    """Why a line has no response."""

    code: str
    message: str
    line: int = 0
    """Of the input, counted from 1, where it has no custom_id; else 0."""


class BatchLine(msgspec.Struct):
    """One line of the output."""

    id: str
    custom_id: str | None
    response: BatchResponse | None = None
    error: BatchError | None = None

    @property
    def key(self) -> str | int:
        """What a later run recognises the line of the input by."""
        return self.custom_id if self.custom_id is not None else self.error.line if self.error else 0


class ServerGone(Exception):
    """The server does not answer any more: lines that have no answer yet are left to a later run."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One line of the input; `error` says why it cannot be sent."""

    line: int
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def key(self) -> str | int:
        return self.custom_id if self.custom_id is not None else self.line


@dataclass(slots=True)
class BatchCounts:
    """Lines of the input by what became of them."""

    answered: int = 0
    failed: int = 0
    """With a status other than 200, or no response."""
    skipped: int = 0
    """They were in the output already, or their custom_id stood in an earlier line."""

    def summary(self) -> str:
        return f"{self.answered} answered, {self.failed} failed, {self.skipped} skipped"


class BatchOutput:
    """The output file, open for appending and locked; `done` are the keys of its lines.

    A last line that was cut off is removed. Raises SettingsError where the file holds anything else than output lines,
    or another run has it open.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise SettingsError(f"cannot write {path}: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.done = self._read_done(path)
        except OSError:
            self._file.close()
            raise SettingsError(f"{path} is being written by another run") from None
        except BaseException:
            self._file.close()
            raise
        self._unsynced = 0

    def __enter__(self) -> BatchOutput:
        return self

    def __exit__(self, *_: object) -> None:
        self._sync()
        self._file.close()

    def append(self, line: BatchLine) -> None:
        """Write one line; what is written survives this process at once, and the machine after every so many lines."""
        data = memoryview(msgspec.json.encode(line) + b"\n")
        while data:
            data = data[self._file.write(data) or 0 :]
        self._unsynced += 1
        if self._unsynced >= LINES_PER_SYNC:
            self._sync()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._unsynced = 0

    def _read_done(self, path: Path) -> set[str | int]:
        """The keys of all whole lines; everything is checked before anything is cut off."""
        decode = msgspec.json.Decoder(BatchLine).decode
        done: set[str | int] = set()
        end = 0
        self._file.seek(0)
        with open(self._file.fileno(), "rb", closefd=False) as reader:
            for number, line in enumerate(reader, 1):
                if not line.endswith(b"\n"):
                    if line[: len(_LINE_START)] != _LINE_START[: len(line)]:
                        raise SettingsError(f"{path} is no output of a batch: see its line {number}")
                    break
                try:
                    done.add(decode(line).key)
                except DECODE_ERRORS:
                    raise SettingsError(f"{path} is no output of a batch: see its line {number}") from None
                end += len(line)
        self._file.truncate(end)
        return done


def read_requests(path: Path) -> Iterator[BatchRequest]:
    """The lines of the input as they are needed; blank ones are left out. Raises SettingsError."""
    decode = msgspec.json.Decoder(_InputLine).decode
    try:
        with path.open("rb") as reader:
            for number, line in enumerate(reader, 1):
                if line.strip():
                    yield _read_request(decode, number, line)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None


def _read_request(decode: Any, number: int, line: bytes) -> BatchRequest:
    try:
        read: _InputLine = decode(line)
    except DECODE_ERRORS as error:
        return BatchRequest(number, _custom_id(line), error=f"not a request of a batch: {error}")
    if read.method != "POST" or read.url not in URLS:
        return BatchRequest(number, read.custom_id, error=f"only POST to {' or '.join(URLS)} is supported")
    if read.body.get("stream"):
        return BatchRequest(number, read.custom_id, error="stream is not supported in a batch")
    return BatchRequest(number, read.custom_id, read.url, read.body)


class _OnlyId(msgspec.Struct):
    custom_id: str | None = None


def _custom_id(line: bytes) -> str | None:
    try:
        return msgspec.json.decode(line, type=_OnlyId).custom_id
    except DECODE_ERRORS:
        return None


def unanswered(requests: Iterator[BatchRequest], done: set[str | int], counts: BatchCounts) -> Iterator[BatchRequest]:
    """The requests whose key is not in `done`, which grows by theirs; the others are counted as skipped."""
    for request in requests:
        if request.key in done:
            counts.skipped += 1
        else:
            done.add(request.key)
            yield request


async def answer_line(client: ApiClient, request: BatchRequest, model: str) -> BatchLine:
    """The line of the output for one of the input; `model` is what a body means that names none. Raises ServerGone."""
    line_id = ID_PREFIX + secrets.token_hex(12)
    if request.error:
        number = request.line if request.custom_id is None else 0
        return BatchLine(line_id, request.custom_id, error=BatchError("invalid_request", request.error, number))
    try:
        answer = await client.post(request.url, msgspec.json.encode({"model": model, **request.body}))
        body = msgspec.Raw(msgspec.json.format(answer.body, indent=-1))  # on one line
    except NoAnswer as failure:
        if not await client.reachable():
            raise ServerGone(str(failure)) from None
        return BatchLine(line_id, request.custom_id, error=BatchError("no_answer", str(failure)))
    except DECODE_ERRORS:
        error = BatchError("no_answer", f"HTTP {answer.status} with a body that is not JSON")
        return BatchLine(line_id, request.custom_id, error=error)
    return BatchLine(line_id, request.custom_id, BatchResponse(answer.status, _answer_id(answer.body), body))


class _OnlyAnswerId(msgspec.Struct):
    id: str = ""


def _answer_id(body: bytes) -> str:
    """The server's own id of the request, as in its logs; empty in an error."""
    try:
        return msgspec.json.decode(body, type=_OnlyAnswerId).id
    except DECODE_ERRORS:
        return ""
