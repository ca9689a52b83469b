"""The names that `baton` has for offline use, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import baton
from baton.offline.llm import LLM
from baton.offline.sampling import SamplingParams


def loaded_after(code: str) -> set[str]:
    names = "{'torch', 'zmq', 'tqdm', 'msgspec', 'tokenizers'}"
    code = f"import sys\n{code}\nprint(*({names} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True).stdout
    return set(out.split())


def test_importing_the_package_loads_nothing() -> None:
    """Every process imports it, and a worker has no use for a client."""
    assert loaded_after("import baton") == set()


def test_the_client_loads_no_engine() -> None:
    """torch takes seconds and 200 MB in a program that only sends requests."""
    assert loaded_after("from baton import LLM, SamplingParams") & {"torch", "zmq"} == set()


def test_names() -> None:
    assert baton.LLM is LLM and baton.SamplingParams is SamplingParams
    with pytest.raises(AttributeError, match="Llm"):
        baton.Llm  # noqa: B018
