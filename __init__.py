"""Baton serves large language models with prefill and decode on separate pools of workers.

The root of the repository is this package: `baton.proxy` is the folder `proxy/`. Importing it imports nothing else; the
names of offline use, as in `from baton import LLM, SamplingParams`, are imported when they are first looked up.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULE_OF = {
    "LLM": "baton.offline.llm",
    "SamplingParams": "baton.offline.sampling",
    "StructuredOutputsParams": "baton.offline.sampling",
    "RequestOutput": "baton.offline.outputs",
    "CompletionOutput": "baton.offline.outputs",
}


def __getattr__(name: str) -> Any:
    """A name of offline use. Imported with the package, each worker would load them, and floors would be crossed."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
