"""proxy.metrics.merge: the pages of two proxies become one that a Prometheus parser takes, with all series in it."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from baton.proxy.metrics.merge import merge


def page(count: int, *, more: bool = False) -> str:
    registry = CollectorRegistry()
    Counter("vllm:tokens", 'Tokens, "all" of them.', ("model_name",), registry=registry).labels('a "b" } c').inc(count)
    Gauge("baton:waiting", "No label.", registry=registry).set(count)
    Histogram("vllm:ttft_seconds", "TTFT.", ("model_name",), registry=registry, buckets=(1.0,)).labels("m").observe(0.5)
    Gauge("baton:none", "No sample.", ("worker",), registry=registry)
    if more:
        Gauge("baton:more", "Of one proxy.", registry=registry).set(1)
    return generate_latest(registry).decode()


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """Values by name and proxy, without times of creation."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families), "a family is described twice"
    return {
        (sample.name, sample.labels["proxy"] + sample.labels.get("le", "")): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_every_series_of_every_proxy_is_there_once() -> None:
    """Guards against lost or doubled series, and families that Prometheus refuses since they are in two places."""
    found = samples_of("".join(merge({"0": page(3), "1": page(5, more=True)})))
    assert found["vllm:tokens_total", "0"] == 3 and found["vllm:tokens_total", "1"] == 5
    assert found["baton:waiting", "0"] == 3 and found["baton:waiting", "1"] == 5
    assert found["vllm:ttft_seconds_bucket", "0+Inf"] == 1 and found["vllm:ttft_seconds_count", "1"] == 1
    assert found["baton:more", "1"] == 1 and ("baton:more", "0") not in found


def test_other_labels_and_help_stay_as_they_are() -> None:
    """Guards names of models with quotes and brackets in them."""
    text = "".join(merge({"0": page(3)}))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["vllm:tokens"].documentation == 'Tokens, "all" of them.'
    (sample,) = [each for each in families["vllm:tokens"].samples if each.name.endswith("_total")]
    assert sample.labels == {"model_name": 'a "b" } c', "proxy": "0"}


def test_a_proxy_that_does_not_answer_leaves_the_others() -> None:
    """Guards a scrape while one of the proxies restarts."""
    assert {proxy for _, proxy in samples_of("".join(merge({"1": page(5)})))} >= {"1"}
    assert not list(merge({}))
