"""The error of all benchmarks; knows none of them."""


class BenchmarkFailed(Exception):
    """A precondition of the measurement was not met; the message says which."""
