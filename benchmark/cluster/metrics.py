"""A /metrics page, and differences between two of them. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


@dataclass(frozen=True, slots=True)
class Histogram:
    """`buckets`: (upper bound, observations up to it), the bounds rising, the last one infinite."""

    buckets: tuple[tuple[float, float], ...]
    sum: float

    @property
    def count(self) -> float:
        return self.buckets[-1][1] if self.buckets else 0.0

    @property
    def mean(self) -> float:
        return self.sum / self.count if self.count else 0.0

    def since(self, before: Histogram) -> Histogram:
        """What was observed after `before`."""
        earlier = dict(before.buckets)
        buckets = tuple((bound, count - earlier.get(bound, 0.0)) for bound, count in self.buckets)
        return Histogram(buckets, self.sum - before.sum)

    def quantile(self, part: float) -> float:
        """By linear interpolation in its bucket, as Prometheus does; the last finite bound where it lies above."""
        wanted, below, low = part * self.count, 0.0, 0.0
        for bound, count in self.buckets:
            if count >= wanted and count > below:
                return low if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
            below, low = count, bound
        return 0.0


class MetricsPage:
    """A /metrics page, parsed. A series that is not on it is 0."""

    def __init__(self, text: str) -> None:
        self._samples: dict[str, list[Sample]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples.setdefault(sample.name, []).append(sample)

    def total(self, name: str, **labels: str) -> float:
        """The sum over all series that have these labels."""
        return sum(sample.value for sample in self._with(name, labels))

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """The same for each value of `label`."""
        found: dict[str, float] = {}
        for sample in self._with(name, labels):
            found[sample.labels[label]] = found.get(sample.labels[label], 0.0) + sample.value
        return found

    def histogram(self, name: str, **labels: str) -> Histogram:
        """All series that have these labels, as one."""
        buckets: dict[float, float] = {}
        for sample in self._with(f"{name}_bucket", labels):
            bound = float(sample.labels["le"])
            buckets[bound] = buckets.get(bound, 0.0) + sample.value
        return Histogram(tuple(sorted(buckets.items())), self.total(f"{name}_sum", **labels))

    def _with(self, name: str, labels: dict[str, str]) -> Iterator[Sample]:
        return (each for each in self._samples.get(name, ()) if labels.items() <= each.labels.items())
