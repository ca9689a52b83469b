"""The interface between the HTTP side of the proxy and the side that talks to workers.

`proxy.http` knows text and HTTP; an `Engine` knows requests, attempts and workers. Only token ids pass between them.
`baton.testing.fake_engine` has an engine that replays a script.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import msgspec

from baton.node.messages.control import Load, Logprob, PromptLogprob, SamplingSpec
from baton.proxy.metrics.timeline import Timeline
from baton.proxy.routing.adapter_places import RequestAdapter
from baton.proxy.scaling.objectives import RoleScale

BODY_MEMORY_BYTES = 256 << 20
"""25 bodies of the default largest size, or some thousand usual ones."""


class Delta(msgspec.Struct, frozen=True, gc=False):
    """New tokens of one generation; the last one of a generation has a `finish`, and none follows it.

    Only a delta with prompt_logprobs, or the one that ends a generation of no token, has no ids.
    """

    ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...] = ()
    """One for each id where the request asked for log probabilities, else empty."""
    finish: str = ""
    """"" | "stop" | "length"."""
    cached_tokens: int = 0
    """Prompt tokens whose KV a cache had; valid from the first delta with ids on."""
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    """Of the next tokens of the prompt, in order from its second one on; all of them come before the first id."""
    accepted_prediction: int = 0
    """Of the ids, those that were guessed from the client's prediction."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One registered worker as the proxy sees it."""

    worker: str
    role: str
    state: str
    load: Load
    block_tokens: int = 0
    """0: it has no pool."""
    model: str = ""
    """The name under which its model is served; empty: it serves all."""
    revision: str = ""
    """Of the deployment; workers of one revision are paired."""
    orphaned: bool = False
    """What started it is gone."""
    max_loras: int = 0
    """Adapters that one of its steps can compute with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One answer to be generated; an HTTP request has one for each prompt and each of its n."""

    request_id: str
    """Drawn at random, never a client's text: workers serve several proxies and know requests by it."""
    model: str
    """The name under which it is served."""
    prompt_ids: tuple[int, ...]
    sampling: SamplingSpec
    tenant: str = ""
    """The name of the one that it is of; empty: a probe of our own."""
    speculate: bool = True
    """Tokens may be guessed, and verified several at a time."""
    prediction_ids: tuple[int, ...] | None = None
    """Tokens that the client predicts; None: it predicts nothing."""
    expected_tokens: int = 0
    """Of its answer: what it counts as, beside those of other tenants, until it has ended."""
    priority: int = 0
    """Higher is served first."""
    follows: bool = False
    """Others of its request have run before it: it waits also where the queue for workers is full."""
    session_key: bytes = b""
    """What the policy `session` routes by; empty: nothing."""
    cache_salt: bytes = b""
    """Only generations of one salt share KV; see kvtransfer.blocks.hashing."""
    adapter: RequestAdapter | None = None
    """None: the model alone."""


class Engine(Protocol):
    """Turns prompts into tokens; the HTTP side is its only caller."""

    def generate(
        self, generation: Generation, timeline: Timeline, *, timeout_s: float
    ) -> AsyncGenerator[list[Delta], None]:
        """Deltas up to and including the one with a finish, in order; those of one list were there together. Nothing
        starts before the first iteration.

        What happens to the request is stamped on `timeline`.
        Raises BadRequest, Overloaded, PeerLost or DeadlineExceeded on iteration. `aclose()`, or the cancellation of
        the task that iterates, cancels both legs.
        """
        ...

    def ready(self) -> str:
        """Empty if requests to all models can be served now, else the reason why not."""
        ...

    async def load_adapter(self, model: str, adapter: RequestAdapter, *, timeout_s: float) -> None:
        """Have the model's workers keep it in memory. Raises BadRequest where it cannot be used, PeerLost where no
        worker is there, DeadlineExceeded where none of a role has it in time."""
        ...

    def max_model_len(self, model: str) -> int:
        """Tokens of prompt and answer together; 0 until a worker of the model has registered."""
        ...

    def worker_loads(self) -> list[WorkerStatus]: ...

    def dispatched(self) -> Mapping[str, Mapping[str, int]]:
        """Attempts that went to each revision of the workers, by model and name of the revision."""
        ...

    def scales(self) -> Mapping[str, Sequence[RoleScale]]:
        """The workers that the objectives ask for, by model: of each role that has had a worker."""
        ...

    def counters(self) -> Mapping[str, float]:
        """Totals since the start, by name: `routed_local_total`, `attempts_total`, `worker_lost_total` ..."""
        ...


@dataclass(frozen=True, slots=True)
class AppSettings:
    """Settings of the HTTP side; all sizes, counts and times of a request are bounded by these."""

    aliases: tuple[str, ...] = ()
    """Further names of the first model."""
    adapter_root: Path | None = None
    """Adapters may be loaded from folders inside it; None: none but those that were there at the start."""
    adapter_state: Path | None = None
    """The file that keeps what was loaded; None: one inside the root."""

    api_keys: tuple[str, ...] = ()
    """Empty: requests need no key."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may read answers in a browser; "*": all."""
    allowed_hosts: tuple[str, ...] | None = None
    """Names that requests may be sent to, beside IP addresses and local names; None: all."""
    access_log: bool = False
    """Log a line a request."""
    request_timeout_s: float = 600.0
    max_body_bytes: int = 10 << 20
    body_memory_bytes: int = BODY_MEMORY_BYTES
    """Of all bodies that are arriving, or whose prompts are not tokens yet; beyond it requests get 503."""
    max_prompts: int = 64
    """Prompts in one completion request."""
    max_n: int = 16
    """Answers to one prompt."""
    refuse_unknown_parameters: bool = False
    """Else they are ignored, and named in the log and in a header."""
    max_generations: int = 256
    """Generations of one HTTP request that run, or wait for a worker, at once; its others wait for these."""
    max_requests: int = 2048
    """HTTP requests that are being answered at once; the next one gets 429."""
    default_completion_tokens: int = 16
    """Where a request to /v1/completions says no max_tokens; a chat then goes on to the end of the context."""
    probe_timeout_s: float = 10.0
    """How long /health_generate waits for its token."""
    slow_request_s: float = math.inf
    """A generation that takes longer is logged with its whole timeline."""
    reasoning_field: str = "reasoning_content"
    """The name of reasoning in chats' answers."""
    debug_requests: int = 0
    """Generations that are over and can be looked up at /debug/requests; 0: there is no such route."""
    metrics: bool = True
    version: str = "0"
