"""The settings of the proxy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from baton.node.api_settings import ApiSettings
from baton.node.errors import SettingsError
from baton.node.orphan import ORPHAN_HELP
from baton.node.secret_file import SECRET_HELP, SECRET_VARIABLE
from baton.node.settings import option
from baton.proxy.routing.router import POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings(ApiSettings):
    model: str = option("demo", help="model whose tokenizer and chat template to use: a folder, a hub id, or 'demo'")
    proxy_index: int = option(0, help="which of --proxies this one is, counted from 0", minimum=0, maximum=63)
    group_folder: Path | None = option(
        None,
        metavar="FOLDER",
        help="a folder of mode 0700 where this proxy is asked without a key: by the others of several --proxies, for "
        "metrics and past requests, and by the process that started it",
    )
    control_address: str = option("tcp://127.0.0.1:5570", metavar="ADDRESS", help="address that workers connect to")
    secret_file: Path | None = option(None, metavar="FILE", env=SECRET_VARIABLE, help=SECRET_HELP)
    namespace: tuple[str, ...] = option(
        (),
        metavar="DIGITS",
        help="refuse workers whose namespace, which they log as they start, does not begin with these 12 to 64 hex "
        "digits; without it, the first worker of each --revision that joins sets the namespace of that revision",
    )
    policy: str = option(
        "kv-aware",
        choices=POLICIES,
        help="how workers are chosen: by cached prefix and load, by load alone, in turn, or by the request's "
        "`prompt_cache_key` or `user`",
    )
    local_prefill: str = option(
        "auto",
        choices=("never", "short", "auto", "always"),
        help="which prompts decode workers prefill: none; short ones, and all while there is no prefill worker; also "
        "those that would wait for a prefill worker longer than they delay decoding; or all (colocated serving)",
    )
    local_prefill_tokens: int = option(
        16,
        unit="tokens",
        help="a prompt is short if fewer of its tokens are not cached on the decode worker",
        minimum=0,
        maximum=1 << 20,
    )
    local_prefill_itl_weight: float = option(
        0.25,
        help="with --local-prefill auto, weight of delaying a decoding request against delaying a first token: lower "
        "values make decode workers prefill more",
        minimum=0,
        maximum=1e6,
    )
    slo_ttft_ms: float = option(
        1000.0, unit="ms", help="objective for the time to the first token, at the 90th percentile", minimum=1
    )
    slo_tpot_ms: float = option(
        50.0, unit="ms", help="objective for the mean time of each later token, at the 90th percentile", minimum=0.1
    )
    kv_index_blocks: int = option(
        1 << 19,
        unit="blocks",
        help="most KV blocks whose holders the router remembers, at about 250 bytes each",
        minimum=1,
        maximum=1 << 26,
    )
    max_queue: int = option(
        512, unit="requests", help="most requests that wait for a worker; further ones get a 429", minimum=1
    )
    max_attempts: int = option(4, unit="attempts", help="times a request is tried when workers fail", minimum=1)
    request_timeout_s: float = option(600.0, unit="s", help="deadline of a request", minimum=0.1, maximum=86400)
    stall_s: float = option(60.0, unit="s", help="a busy worker without a step for this long counts as dead", minimum=1)
    drain_s: float = option(30.0, unit="s", help="time for running requests to finish after SIGTERM", minimum=0)
    orphan_s: float | None = option(None, unit="s", help=ORPHAN_HELP, minimum=0, maximum=1e6)
    slow_request_s: float | None = option(
        None, unit="s", help="log the timeline of requests that take longer, as a warning", minimum=0
    )
    debug_requests: int = option(
        0,
        unit="requests",
        help="number of finished requests that GET /debug/requests/ID can show; 0: no such route",
        minimum=0,
    )
    otlp_endpoint: str = option(
        "",
        metavar="URL",
        env="OTEL_EXPORTER_OTLP_ENDPOINT",
        help="send a trace of each request to this address, by OTLP over HTTP; needs the extra 'otel' (where only the "
        "environment asks for traces, serving without it is a warning)",
    )
    log_level: str = option("info", choices=("debug", "info", "warning", "error"), help="lowest level that is logged")

    def __post_init__(self) -> None:
        ApiSettings.__post_init__(self)  # super() does not work in a class with slots
        for digits in self.namespace:
            if not re.fullmatch("[0-9A-Fa-f]{12,64}", digits):
                raise SettingsError(f"--namespace {digits!r} is not 12 to 64 hex digits")
        if self.proxy_index >= self.proxies:
            raise SettingsError(f"--proxy-index {self.proxy_index} of --proxies {self.proxies}, counted from 0")
        if self.proxies > 1 and not self.port:
            raise SettingsError("--port 0 would give each of several --proxies a port of its own")
        if self.proxies > 1 and self.group_folder is None:
            raise SettingsError(f"--proxies {self.proxies} needs --group-folder, which `baton serve` makes")

    @property
    def name(self) -> str:
        """Of this proxy, in logs and towards workers."""
        return "proxy" if self.proxies == 1 else f"proxy-{self.proxy_index}"

    def share_of(self, limit: int) -> int:
        """This proxy's part of a limit that all at the port keep together."""
        return -(-limit // self.proxies)
