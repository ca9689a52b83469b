"""The settings of a load test. Names are those of `vllm bench serve` where it has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from baton.benchmark.load.summary import METRICS, Objectives
from baton.node.decoding import DECODE_ERRORS
from baton.node.errors import SettingsError
from baton.node.settings import option

DEFAULT_NUM_PROMPTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingSettings:
    # -- the server
    base_url: str = option("http://127.0.0.1:8000", metavar="URL", help="the server, without /v1/...")
    compare: tuple[str, ...] = option(
        (), metavar="URL", help="two or more servers instead, as URL or NAME=URL: their runs take turns"
    )
    model: tuple[str, ...] = option(
        (), help="name of the model in requests, or one a server of --compare; default: the first that a server lists"
    )
    backend: str = option(
        "openai", choices=("openai", "openai-chat"), help="which endpoint: /v1/completions or /v1/chat/completions"
    )
    api_key: str = option("", env="OPENAI_API_KEY", help="API key, sent as a bearer token")
    temperature: float = option(0.0, help="sampling temperature of every request", minimum=0)
    ignore_eos: bool = option(False, help="ask for all of max_tokens (vLLM's and Baton's parameter)")
    include_usage: bool = option(True, help="ask the server to count tokens; otherwise chunks with text are counted")
    extra_body: str = option("", metavar="JSON", help="more fields of every request, as a JSON object")
    request_timeout_s: float = option(600.0, unit="s", help="a request that takes longer has failed", minimum=0.1)

    # -- when
    num_prompts: int | None = option(
        None,
        unit="requests",
        help="number of requests (with --turns: of conversations); default 100, or all of a trace",
        minimum=1,
    )
    duration_s: float | None = option(
        None, unit="s", help="instead of --num-prompts: the requests that are due in this time", minimum=0.1
    )
    request_rate: tuple[str, ...] = option(
        (),
        metavar="RATE",
        help="requests/s, or inf for all at once (the default, but for a trace); several rates are run one by one",
    )
    burstiness: float = option(
        1.0, help="shape of the gamma distribution of gaps: 1 is Poisson, less is burstier", minimum=0.01
    )
    arrivals: str = option("gamma", choices=("gamma", "constant"), help="how requests are spread at a rate")
    ramp_up_strategy: str = option("", choices=("", "linear", "exponential"), help="a rate that changes over the run")
    ramp_up_start_rps: float = option(1.0, unit="requests/s", help="rate at the start of a ramp", minimum=0.001)
    ramp_up_end_rps: float = option(10.0, unit="requests/s", help="rate at the end of a ramp", minimum=0.001)
    max_concurrency: int | None = option(
        None, unit="requests", help="limit on requests in flight; waiting for a slot counts in the latency", minimum=1
    )
    num_warmups: int = option(
        4, unit="requests", help="requests that are sent before each run and not counted", minimum=0
    )
    seed: tuple[int, ...] = option(
        (0,), help="seed of lengths, arrivals and cancellations; several are run one by one", minimum=0
    )
    cancel_rate: float = option(
        0.0,
        help="fraction of requests (of conversations: in their last turn) that the client cancels",
        minimum=0,
        maximum=1,
    )

    # -- what
    random_input_len: int = option(1024, unit="tokens", help="length of a random prompt, or of one turn", minimum=1)
    random_output_len: int = option(128, unit="tokens", help="max_tokens of each request", minimum=1)
    random_range_ratio: float = option(0.0, help="lengths vary by this fraction up and down", minimum=0, maximum=1)
    random_prefix_len: int = option(0, unit="tokens", help="length of a prefix that random prompts share", minimum=0)
    num_prefixes: int = option(1, help="how many different prefixes the prompts share", minimum=1)
    turns: int = option(1, help="turns of a conversation; each prompt holds all earlier turns", minimum=1)
    think_s: float = option(0.0, unit="s", help="pause between an answer and the next turn", minimum=0)
    dataset_path: Path | None = option(None, help="JSON lines with prompt (text or ids) or messages, and max_tokens")
    trace: Path | None = option(
        None, help="Mooncake (JSON lines) or Azure (CSV) trace, whose times and lengths are used"
    )
    trace_speed: float = option(1.0, help="replay a trace this many times faster", minimum=0.001)
    trace_length_scale: float = option(1.0, help="multiply the lengths of a trace by this", minimum=0.0001, maximum=1)
    trace_jitter_s: float | None = option(
        None, unit="s", help="move arrivals by up to this much; default: the tick of the trace's clock", minimum=0
    )
    prompt_as: str = option(
        "auto",
        choices=("auto", "ids", "text"),
        help="random prompts as token ids or as text; auto: ids, but text in chats and conversations",
    )
    vocab_size: int = option(2000, unit="tokens", help="random ids are below this", minimum=1)
    tokenizer: str = option(
        "", metavar="MODEL", help="model folder or hub id: text of words that are one token each in it"
    )
    prompt_salt: int | None = option(
        None, help="makes prompts differ from those of other runs; default: random, and printed", minimum=0
    )

    # -- judging and showing
    goodput: tuple[str, ...] = option((), metavar="NAME:MS", help="objectives: ttft:1000 tpot:15 e2el:5000")
    find_rate: bool = option(False, help="search the highest rate at which --attainment of requests meet --goodput")
    attainment: float = option(
        0.9,
        help="fraction of requests that must meet --goodput at the rate that --find-rate looks for",
        minimum=0.01,
        maximum=1,
    )
    percentile_metrics: str = option("ttft,tpot,itl,e2el", metavar="NAMES", help="latencies to show and save")
    metric_percentiles: str = option("50,90,95,99", metavar="NUMBERS", help="percentiles of these latencies")
    label: str = option("", help="name of this run in files; default: the backend")
    save_result: bool = option(False, help="write a JSON file a run, with vLLM's keys")
    save_detailed: bool = option(False, help="include the numbers of every request, as vLLM does")
    save_requests: bool = option(False, help="write JSON lines, one for each request")
    result_dir: Path = option(Path("."), help="folder of these files")
    html: Path | None = option(None, help="write a report with plots that opens offline (needs the extra 'bench')")
    self_test: bool = option(False, help="measure this client against a server that computes nothing, and exit")

    def __post_init__(self) -> None:
        """Checks everything that can be checked before the first request."""
        for text in self.request_rate:
            rate_of(text)
        if self.compare and len(self.compare) < 2:
            raise SettingsError("--compare needs two servers")
        if len(self.model) not in (0, 1, max(1, len(self.compare))):
            raise SettingsError("--model: one name for all servers, or one for each")
        if self.trace and self.dataset_path:
            raise SettingsError("--trace and --dataset-path exclude one another")
        if self.turns > 1 and (self.trace or self.dataset_path):
            raise SettingsError("--turns makes conversations of random prompts, not of a trace or a prompt file")
        if self.turns > 1 and self.prompt_as == "ids":
            raise SettingsError("--turns needs text: the answers are part of the next prompt")
        if self.chat and self.prompt_as == "ids":
            raise SettingsError("a chat has no token ids: --prompt-as text")
        if self.ramp_up_strategy and (self.request_rate or self.trace or self.find_rate):
            raise SettingsError("--ramp-up-strategy sets the rate; it excludes --request-rate, --trace and --find-rate")
        if self.trace and self.request_rate and self.trace_speed != 1:
            raise SettingsError("--request-rate and --trace-speed exclude one another: both scale the trace's time")
        self._check_search()
        self._check_duration()
        _ = self.objectives, self.percentiles, self.shown_metrics, self.extra_fields

    def _check_search(self) -> None:
        if self.find_rate and not self.goodput:
            raise SettingsError("--find-rate needs --goodput, the objectives to meet")
        if self.find_rate and (len(self.request_rate) > 1 or "inf" in self.request_rate):
            raise SettingsError("--find-rate begins at one --request-rate")

    def _check_duration(self) -> None:
        if self.duration_s is None:
            return
        if self.num_prompts is not None:
            raise SettingsError("--duration-s and --num-prompts exclude one another")
        if self.ramp_up_strategy or not (
            self.trace or self.find_rate or all(rate and math.isfinite(rate) for rate in self.rates)
        ):
            raise SettingsError("--duration-s needs a --request-rate or a --trace")

    @property
    def chat(self) -> bool:
        return self.backend == "openai-chat"

    @property
    def as_ids(self) -> bool:
        return self.prompt_as == "ids" or (self.prompt_as == "auto" and not self.chat and self.turns == 1)

    @property
    def rates(self) -> tuple[float | None, ...]:
        """In requests/s; infinity for all at once; None where the trace or the ramp sets it."""
        if self.request_rate:
            return tuple(map(rate_of, self.request_rate))
        return (None,) if self.trace or self.ramp_up_strategy else (math.inf,)

    @property
    def objectives(self) -> Objectives:
        return Objectives.parse(self.goodput)

    @property
    def percentiles(self) -> tuple[float, ...]:
        """Those that are shown; 50 and 99 always, which reports are made of."""
        try:
            asked = {float(text) for text in self.metric_percentiles.split(",")}
        except ValueError:
            asked = {-1.0}
        if not all(0 <= percentile <= 100 for percentile in asked):
            raise SettingsError(f"--metric-percentiles {self.metric_percentiles!r}: numbers from 0 to 100, with commas")
        return tuple(sorted(asked | {50.0, 99.0}))

    @property
    def shown_metrics(self) -> tuple[str, ...]:
        names = tuple(self.percentile_metrics.split(","))
        if not set(names) <= set(METRICS):
            raise SettingsError(f"--percentile-metrics {self.percentile_metrics!r}: some of {','.join(METRICS)}")
        return names

    @property
    def extra_fields(self) -> Mapping[str, object]:
        if not self.extra_body:
            return {}
        try:
            return msgspec.json.decode(self.extra_body, type=dict[str, object])
        except DECODE_ERRORS as error:
            raise SettingsError(f"--extra-body: {error}") from None


def rate_of(text: str) -> float:
    """ "inf" or a number of requests/s; raises SettingsError."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not rate > 0:
        raise SettingsError(f"--request-rate {text!r}: a number above 0, or inf")
    return rate
