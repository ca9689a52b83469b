"""The settings of the proxy."""

from __future__ import annotations

from dataclasses import dataclass

from baton.node.settings import option
from baton.proxy.routing.router import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    model: str = option("demo", help="model whose tokenizer and chat template to use: a folder, a hub id, or 'demo'")
    served_model_name: str = option("", help="name of the model in the API; default: the folder's name")
    host: str = option("127.0.0.1", help="address of the HTTP server")
    port: int = option(8000, help="port of the HTTP server", minimum=0, maximum=65535)
    control_address: str = option("tcp://127.0.0.1:5570", metavar="ADDRESS", help="where workers join")
    insecure_network: bool = option(False, help="allow binding to an address that other machines can reach")
    api_key: tuple[str, ...] = option((), env="BATON_API_KEY", help="key that guards every route but the probes")
    policy: str = option(
        "kv-aware",
        choices=POLICIES,
        help="how workers are chosen: by what they hold of the prompt and have to do; by the latter alone; in turn; or "
        "one for each `prompt_cache_key` or `user` of a request",
    )
    local_prefill: str = option(
        "auto",
        choices=("never", "short", "auto", "always"),
        help="which prompts decode workers prefill themselves: none; the short ones, and all while no prefill worker "
        "is there; also those that would wait for a prefill worker longer than they hold up decoding; or all "
        "(colocated serving)",
    )
    local_prefill_tokens: int = option(
        16,
        unit="tokens",
        help="prompts of which the decode worker lacks fewer tokens are short",
        minimum=0,
        maximum=1 << 20,
    )
    local_prefill_itl_weight: float = option(
        0.25,
        help="with --local-prefill auto, what a delay of one request that decode has weighs against that of a first "
        "token: less lets decode workers prefill more",
        minimum=0,
        maximum=1e6,
    )
    kv_index_blocks: int = option(
        1 << 19,
        unit="blocks",
        help="most KV blocks whose holders the router remembers, at about 250 bytes each",
        minimum=1,
        maximum=1 << 26,
    )
    max_queue: int = option(512, unit="requests", help="most requests waiting for a worker; more get a 429", minimum=1)
    max_attempts: int = option(4, unit="attempts", help="times a request is tried when workers fail", minimum=1)
    request_timeout_s: float = option(600.0, unit="s", help="deadline of a request", minimum=0.1, maximum=86400)
    stall_s: float = option(
        60.0, unit="s", help="a busy worker without a step for so long is taken for dead", minimum=1
    )
    drain_s: float = option(30.0, unit="s", help="time that running requests get to end after SIGTERM", minimum=0)
    slow_request_s: float | None = option(
        None, unit="s", help="log the timeline of requests that take longer, as a warning", minimum=0
    )
    debug_requests: int = option(
        0, unit="requests", help="how many that ended GET /debug/requests/ID finds; 0: none, no such route", minimum=0
    )
    otlp_endpoint: str = option(
        "",
        metavar="URL",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
        help="send a trace of each request there, by OTLP over HTTP; needs the extra 'otel'",
    )
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="least level that is logged")
