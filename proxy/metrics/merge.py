"""Metrics of several proxies as one page in Prometheus' text format: each series gets the label `proxy`.

Series are not added up here: a sum would fall when one of the proxies restarts, which Prometheus takes for a restart of
all of them. `sum(rate(...))` over the label is right at any time. It knows no metric's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE | re.ASCII)
_FAMILY = "# HELP "


def merge(pages: Mapping[str, str]) -> Iterator[str]:
    """One page of the `pages` by proxy, a family at a time. Each describes every family before its samples."""
    heads: dict[str, str] = {}
    samples: dict[str, list[tuple[str, str]]] = {}
    for proxy, page in pages.items():
        for family in page.split(_FAMILY)[1:]:
            text, kind, *lines = family.rstrip("\n").split("\n")
            name = text.partition(" ")[0]
            heads.setdefault(name, f"{_FAMILY}{text}\n{kind}\n")
            samples.setdefault(name, []).append(("\n".join(lines), proxy))
    return (heads[name] + "".join(_labelled(*each) for each in found) for name, found in samples.items())


def _labelled(lines: str, proxy: str) -> str:
    """The samples with the label `proxy` behind their other labels."""
    if not lines:
        return ""

    def with_label(sample: re.Match[str]) -> str:
        name, labels, value = sample.groups()
        return f'{name}{{{labels + "," if labels else ""}proxy="{proxy}"}} {value}'

    return _SAMPLE.sub(with_label, lines) + "\n"
