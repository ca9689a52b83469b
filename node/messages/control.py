"""Messages between the proxy and workers or stores: membership, dispatched requests, results, KV events.

Every message about a request carries `(request_id, attempt)`.

    worker -> proxy    Register, Heartbeat, Goodbye, Reserved, Busy, PromptLogprobs, Tokens, Bundle, HandedOver, Failed,
                       Cancelled, AdapterLoaded
    proxy  -> worker   Registered, Refused, Ping, Rejoin, Prefill, Reserve, Cancel, Drain, LoadAdapter
    store  -> proxy    RegisterStore, Heartbeat, Goodbye
    worker, store -> proxy    KvEvents, KvSnapshot
    proxy -> worker, store    KvReplay
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from baton.node.messages.base import (
    MAX_TOKENS,
    PROTOCOL_VERSION,
    Bias,
    Count,
    Digest,
    EventHashes,
    FinishReason,
    Hashes,
    Message,
    Name,
    Rate,
    Role,
    Seconds,
    Small,
    Text,
    Tier,
    TokenId,
    TokenIds,
)

MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS = 128, 32
MAX_PREDICTION_TOKENS = 16384
MAX_PROMPT_LOGPROBS = 1024
"""Entries in one message."""
MAX_GRAMMAR_CHARACTERS = 1 << 18

MAX_ADAPTERS = 256
"""That a worker names in one report."""
MAX_SILENT_PEERS = 256
MAX_PEERS = 16
"""Greeted before a transfer: a pair holds memory of the GPU, and is probed."""
BEFORE_VERSIONS = 3
"""The version of nodes that do not say theirs in an answer."""
MAX_PRIORITY = (1 << 63) - 1
"""Some clients send times as priorities."""

# ---- values inside messages -------------------------------------------------------------------------------------


BadWord = Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=MAX_BAD_WORD_TOKENS)]


class Grammar(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The language that generated text must belong to, in llguidance's dialect of Lark.

    It holds from the first generated token on, or behind the reasoning of a model that reasons: `opened_by` says that
    reasoning is there if the first token opens it, an empty `opened_by` beside `begins_after` that it is in any case.
    Reasoning is free, but for the end tokens.
    """

    text: Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]
    end_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1, max_length=128)]
    """The model's end tokens, which may follow where the text is complete."""
    begins_after: Annotated[tuple[TokenId, ...], Meta(max_length=8)] = ()
    """Reasoning ends with the first of these; empty: there is no reasoning."""
    opened_by: Annotated[tuple[TokenId, ...], Meta(max_length=8)] = ()
    blank_ids: Annotated[tuple[TokenId, ...], Meta(max_length=8)] = ()
    """Line breaks, of which up to two may follow the end of reasoning."""
    max_reasoning: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    """Tokens of reasoning between what opens and what ends it: behind so many, its end is drawn. None: any number."""


AdapterDigest = Annotated[bytes, Meta(min_length=32, max_length=32)]
AdapterDigests = Annotated[tuple[AdapterDigest, ...], Meta(max_length=MAX_ADAPTERS)]


class AdapterRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """An adapter, named by its content, and where it is read."""

    digest: AdapterDigest
    """See baton.node.adapter_folder."""
    path: Text
    """Of the folder, on the worker's host."""


class SamplingSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How the tokens of one sequence are sampled, after the OpenAI and vLLM APIs; every value is explicit."""

    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)]
    """0: the prompt is computed, and no token follows."""
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] = 0
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    """0 is greedy."""
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=(1 << 31) - 1)] = 0
    """0 keeps all."""
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0
    """Chosen by the proxy if the client gives none, so that a replay samples the same tokens."""
    presence_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2.0, le=2.0)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=100.0)] = 1.0
    logit_bias: Annotated[tuple[tuple[TokenId, Bias], ...], Meta(max_length=1024)] = ()
    allowed_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_ALLOWED_TOKENS)] = ()
    """Only these are drawn; empty: all."""
    bad_words: Annotated[tuple[BadWord, ...], Meta(max_length=MAX_BAD_WORDS)] = ()
    """Of each, the last token is not drawn where the tokens before it were generated just before."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    prompt_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    """Most likely tokens beside the log probability of each token of the prompt; None: no log probabilities of it."""
    stop_token_ids: Annotated[tuple[TokenId, ...], Meta(max_length=128)] = ()
    """Includes the model's end tokens unless the client sets ignore_eos; suppressed until min_tokens."""
    grammar: Grammar | None = None
    """Only tokens that continue a text of this language are drawn; it also says where the text may end, not
    min_tokens."""


class Logprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Log probability (natural log) of the sampled token, and those of the most likely tokens."""

    logprob: float
    top: Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=20)] = ()


class PromptLogprob(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Log probability (natural log) of one token of the prompt after those before it."""

    logprob: float
    rank: Annotated[int, Meta(ge=1, le=1 << 31)]
    """1: no token was likelier."""
    top: Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=20)] = ()
    """The most likely tokens, the likeliest first."""


class Stages(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The time that a leg spent in each stage, in order.

    Durations by the worker's own clock, never timestamps: clocks of two hosts are not compared. A stage that the leg
    did not have, or that an earlier message reported, is 0.
    """

    queue_s: Seconds = 0.0
    """From the message's arrival to the first step with a token of it, minus the next stage."""
    tier_load_s: Seconds = 0.0
    """Loading the prompt's KV from a tier below the pool, while none of it is computed."""
    prefill_s: Seconds = 0.0
    """From the start of its first step to its first token."""
    transfer_wait_s: Seconds = 0.0
    """After prefill sampled the first token, while no bytes are in flight (reservation, offer, credit)."""
    transfer_s: Seconds = 0.0
    """From then until the last block has arrived and has been verified."""
    admission_s: Seconds = 0.0
    """Until the start of the step in which decode samples the next token."""
    step_s: Seconds = 0.0
    """That step, until its token is sent."""
    loaded_tokens: Annotated[tuple[Count, ...], Meta(max_length=8)] = ()
    """Prompt tokens whose KV came from each tier below the pool, in the order of node.messages.store.TIER_NAMES."""


class Load(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A worker's load at one moment, as the router sees it."""

    running: Count = 0
    waiting: Count = 0
    waiting_tokens: Count = 0
    """Uncomputed tokens of waiting and running sequences."""
    free_blocks: Count = 0
    total_blocks: Count = 0
    steps: Count = 0
    """Steps since the start: a busy worker whose count does not grow is stuck."""
    prefill_tokens_s: Rate = 0.0
    """Measured prompt tokens computed per second; 0 before the first measurement."""
    adapters: AdapterDigests = ()
    """Those that the next step can compute with, the last used first."""
    adapters_in_memory: AdapterDigests = ()
    """Those that are a copy away from that."""
    counters: Annotated[dict[Name, float], Meta(max_length=256)] = {}


# ---- worker <-> proxy: membership -------------------------------------------------------------------------------


class Register(Message, tag="Register", kw_only=True):
    """A worker joins the cluster; retransmitted until answered."""

    version: Small = PROTOCOL_VERSION
    worker: Name
    incarnation: Count
    role: Role
    model: Text
    namespace: Annotated[bytes, Meta(min_length=32, max_length=32)]
    """Digest of everything that makes KV compatible; workers of different namespaces are never paired."""
    block_tokens: Annotated[int, Meta(ge=1, le=4096)]
    total_blocks: Count
    max_num_seqs: Count
    max_model_len: Annotated[int, Meta(ge=1, le=1 << 24)]
    address: Text
    """Address at which peers connect to this worker's endpoint."""
    grammar: Annotated[str, Meta(max_length=64)] = ""
    """Library and version that make the masks of grammars here, such as llguidance/1.9: workers that differ in it may
    draw different tokens. Empty: this worker takes no request with a grammar."""
    revision: Annotated[str, Meta(max_length=64)] = ""
    """Name of the revision of the deployment that this worker is of: only workers of one revision are paired."""
    max_loras: Small = 0
    """Adapters that one step can compute with; 0: this worker takes no request with an adapter."""
    max_lora_rank: Small = 0
    joins: Count = 0
    """How often this worker has begun to join this proxy: another number says that it has dropped what it had."""
    sent: Count = 0
    """Messages to this proxy before this one (link_counts.py); so in the messages below."""


class Registered(Message, tag="Registered", kw_only=True):
    proxy: Name
    incarnation: Count
    version: Small = BEFORE_VERSIONS
    """In which the proxy will write and read: that of the Register."""
    sent: Count = 0
    peers: Annotated[tuple[tuple[Name, Text], ...], Meta(max_length=MAX_PEERS)] = ()
    """Mixed workers with which a mixed one will exchange KV, and their addresses: it greets them now."""


class Refused(Message, tag="Refused", kw_only=True, omit_defaults=True):
    """The worker, or the peer, is incompatible; the refused sender pauses before it tries again."""

    reason: Text
    version: Small = BEFORE_VERSIONS
    """The newest that the proxy speaks. One that the sender speaks too is tried at once."""


class Heartbeat(Message, tag="Heartbeat", kw_only=True):
    worker: Name
    incarnation: Count
    load: Load
    load_age_s: Seconds = 0.0
    """Age of `load`: later requests are not counted in it."""
    draining: bool = False
    kv_seq: Count = 0
    """Number of the last KvEvents sent."""
    store: Annotated[str, Meta(max_length=96)] = ""
    """Identity of the host's store that this worker is attached to; empty: none."""
    silent_peers: Annotated[tuple[Annotated[str, Meta(max_length=96)], ...], Meta(max_length=MAX_SILENT_PEERS)] = ()
    """Identities of decode workers that do not answer this one."""
    orphaned: bool = False
    """What started this worker is gone: a worker of its name that registers later takes its place."""
    sent: Count = 0


class Goodbye(Message, tag="Goodbye", kw_only=True):
    """A drained worker leaves."""

    worker: Name
    incarnation: Count


class Ping(Message, tag="Ping", kw_only=True):
    """The proxy is alive; a worker that receives none for the session lease drops that proxy's requests."""

    proxy: Name
    incarnation: Count
    sent: Count = 0


class Rejoin(Message, tag="Rejoin", kw_only=True):
    """The proxy does not (or no longer) know this worker: drop the proxy's requests and register again."""


class Drain(Message, tag="Drain", kw_only=True):
    """Finish running requests, admit no new ones, then leave."""


# ---- worker <-> proxy: adapters ---------------------------------------------------------------------------------


class LoadAdapter(Message, tag="LoadAdapter", kw_only=True):
    """Have the adapter in memory; answered with AdapterLoaded. Sent to workers that take adapters only."""

    adapter: AdapterRef


class AdapterLoaded(Message, tag="AdapterLoaded", kw_only=True):
    """Worker to proxy: the adapter is in memory, or `error` says why it cannot be used here."""

    digest: AdapterDigest
    error: Text = ""


# ---- worker, store <-> proxy: KV locations ---------------------------------------------------------------------


class TierChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Blocks added to and removed from one tier of a holder; no hash is in both lists."""

    tier: Tier
    stored: EventHashes = ()
    removed: EventHashes = ()


Changes = Annotated[tuple[TierChange, ...], Meta(max_length=3)]


class RegisterStore(Message, tag="RegisterStore", kw_only=True):
    """A host's store joins, to publish its contents; retransmitted until answered with Registered or Refused."""

    version: Small = PROTOCOL_VERSION
    worker: Name
    incarnation: Count
    joins: Count = 0
    sent: Count = 0


class KvEvents(Message, tag="KvEvents", kw_only=True):
    """Changes of the sender's contents since its KvEvents number `seq - 1`; the first has number 1."""

    seq: Annotated[int, Meta(ge=1, le=1 << 62)]
    changes: Changes


class KvReplay(Message, tag="KvReplay", kw_only=True):
    """The proxy lacks KvEvents from `seq` on. Answered with them or, if they are no longer kept, with KvSnapshots."""

    seq: Annotated[int, Meta(ge=1, le=1 << 62)]


class KvSnapshot(Message, tag="KvSnapshot", kw_only=True):
    """Part `part` of `parts` of the sender's contents after KvEvents number `seq`; it removes nothing."""

    seq: Count
    part: Small
    parts: Annotated[int, Meta(ge=1, le=1 << 20)]
    changes: Changes


# ---- worker <-> proxy: requests ---------------------------------------------------------------------------------


class DispatchBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The part of a dispatch that both legs of an attempt share: the sequence and how to generate it."""

    token_ids: TokenIds
    prompt_len: Count
    """The first `prompt_len` of `token_ids` are the prompt; an earlier attempt generated the rest."""
    root: Digest
    """Hash that the first block is chained to: the namespace and the cache's owner."""
    block_hashes: Hashes
    sampling: SamplingSpec
    num_scored: Count = 0
    """The first `num_scored` tokens of the prompt have their log probabilities from an earlier attempt."""
    deadline_s: Seconds
    priority: Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] = 0
    """Higher is served first."""
    speculate: bool = True
    """Tokens may be guessed, and verified several at a time; the answer is the same."""
    prediction_ids: Annotated[tuple[TokenId, ...], Meta(max_length=MAX_PREDICTION_TOKENS)] = ()
    """Tokens of which the client says that they may follow the prompt."""
    adapter: AdapterRef | None = None
    """All tokens are computed with it; `root` is chained to its digest. None: the model alone."""
    contended: bool = False
    """Other tenants are active: a prompt that a worker computes must not keep theirs waiting for long."""


class Prefill(Message, tag="Prefill", kw_only=True):
    """Compute the KV of the body's tokens, sample the next token, hand both to `decode`.

    Without a `decode`, where max_tokens is 0, the prompt's end is the end of the request.
    """

    request_id: Name
    attempt: Small
    body: DispatchBody
    decode: Annotated[str, Meta(max_length=96)] = ""
    """Endpoint identity of the decode worker, `worker/incarnation`; empty: nothing is handed over."""
    decode_address: Text = ""


class Reserve(Message, tag="Reserve", kw_only=True):
    """Reserve blocks for the body's tokens; continue after prefill's first token, or compute the prompt locally."""

    request_id: Name
    attempt: Small
    body: DispatchBody
    prefill: Annotated[str, Meta(max_length=96)] = ""
    """Endpoint identity of the prefill worker; empty: this worker prefills the prompt itself."""


class Cancel(Message, tag="Cancel", kw_only=True):
    """Stop this request's attempts up to and including `attempt`. Always answered with Cancelled."""

    request_id: Name
    attempt: Small


class Reserved(Message, tag="Reserved", kw_only=True):
    """Decode to proxy: the blocks are reserved (or, for local prefill, the sequence is queued)."""

    request_id: Name
    attempt: Small
    cached_tokens: Count
    """Prompt tokens found in decode's own prefix cache, which are not transferred."""


class Busy(Message, tag="Busy", kw_only=True):
    """The worker has no room for this request: terminal for this leg, retry elsewhere or later."""

    request_id: Name
    attempt: Small
    reason: Text


class PromptLogprobs(Message, tag="PromptLogprobs", kw_only=True):
    """Log probabilities of tokens number `first`, `first + 1` ... of the prompt, in order and before any `Tokens`.

    Sent by the leg that computes the prompt. Token 0 has none.
    """

    request_id: Name
    attempt: Small
    first: Annotated[int, Meta(ge=1, le=MAX_TOKENS)]
    entries: Annotated[tuple[PromptLogprob, ...], Meta(min_length=1, max_length=MAX_PROMPT_LOGPROBS)]


class Tokens(Message, tag="Tokens", kw_only=True, omit_defaults=True, gc=False):
    """New tokens; `index` counts from the first generated token of the request, over all attempts.

    `finish` is empty, "stop" or "length"; with a finish this is the request's terminal message. Only that of a request
    with max_tokens 0 has no token.
    """

    request_id: Name
    attempt: Small
    index: Count
    ids: Annotated[tuple[TokenId, ...], Meta(max_length=65536)]
    logprobs: Annotated[tuple[Logprob, ...], Meta(max_length=65536)] = ()
    finish: FinishReason = ""
    cached_tokens: Count = 0
    """Prompt tokens that this leg did not compute."""
    accepted_prediction: Count = 0
    """Of `ids`, those that were guessed from the client's prediction."""
    stages: Stages | None = None
    """Time since the leg began or since the last report; sent with a leg's first token and with the first token that
    a decode step samples."""


class Bundle(Message, tag="Bundle", kw_only=True):
    """All tokens of one step for one proxy: one frame instead of one a row."""

    tokens: Annotated[tuple[Tokens, ...], Meta(max_length=65536)]


class HandedOver(Message, tag="HandedOver", kw_only=True):
    """Prefill to proxy: decode has acknowledged the whole KV; terminal for the prefill leg."""

    request_id: Name
    attempt: Small
    sent_bytes: Count
    transfer_s: Seconds
    """From the first offer to the acknowledgement."""


class Failed(Message, tag="Failed", kw_only=True):
    """Terminal for this leg. `retryable`: another worker, or a new attempt, may succeed; without it, the request's time
    is up, or this worker's view of the message differs from the sender's."""

    request_id: Name
    attempt: Small
    reason: Text
    retryable: bool
    transfer: bool = False
    """The KV did not come from the prefill to the decode worker, which may both be well."""


class Cancelled(Message, tag="Cancelled", kw_only=True):
    """Terminal answer to Cancel."""

    request_id: Name
    attempt: Small
