"""The exceptions that cross a module boundary, and what may be done about each.

BatonError
├── BadRequest        the client's fault: do not retry unchanged        (HTTP 400, or `status`)
├── Overloaded        there is no room now: retry after `retry_after_s`  (HTTP 429, or `status`)
├── PeerLost          a worker or a transfer failed: another may do it   (HTTP 503 when none is left)
├── TransferFailed    the same, seen from inside a transfer
├── DeadlineExceeded  the request's time is up                           (HTTP 504)
├── SettingsError     a setting, a model folder or a port makes starting impossible
├── AdapterError      a folder holds no adapter that can run here        (HTTP 400)
└── InvariantBroken   a bug: crash, loudly

Only the proxy's HTTP layer turns them into status codes.
"""


class BatonError(Exception):
    """Base of all errors that Baton raises on purpose."""


class BadRequest(BatonError):
    """The client asked for something that cannot be done."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code


class Overloaded(BatonError):
    """A queue or a pool is full."""

    def __init__(self, message: str, *, retry_after_s: float = 1.0, status: int = 429) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = status


class PeerLost(BatonError):
    """A worker went away, or none of the role is there."""


class TransferFailed(BatonError):
    """KV did not arrive whole."""


class DeadlineExceeded(BatonError):
    """The request's deadline passed."""


class SettingsError(BatonError):
    """A setting, a model folder or a port makes starting impossible."""


class AdapterError(BatonError):
    """A folder holds no adapter that can run here; names the field or the tensor."""


class InvariantBroken(BatonError):
    """Something that can never be false was false."""
