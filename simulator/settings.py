"""The command lines of the studies: one frozen dataclass each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from baton.node.errors import SettingsError
from baton.node.settings import option
from baton.prefill.settings import PrefillSettings
from baton.proxy.settings import ProxySettings


def choices_of(settings: type, name: str) -> tuple[str, ...]:
    """The values that the command line of a node allows for one of its options."""
    field = next(field for field in dataclasses.fields(settings) if field.name == name)
    choices: tuple[str, ...] = field.metadata["option"].choices
    return choices


PROXY = ProxySettings()
ROUTING = choices_of(ProxySettings, "policy")
LOCAL = choices_of(ProxySettings, "local_prefill")
LOADS = choices_of(PrefillSettings, "store_loads")
ORDERS = choices_of(PrefillSettings, "policy")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSettings:
    """Requests out of a trace, or drawn."""

    profile: str = option("h200-llama-8b", help="latency profile: the name of a shipped one, or a JSON file")
    trace: Path | None = option(
        None, help="trace to replay, Mooncake's (JSON lines) or Azure's (.csv); else requests are drawn"
    )
    speed: float = option(1.0, help="replay the trace this many times faster", minimum=0.001)
    requests: int = option(1000, unit="requests", help="number of requests; 0: all of the trace", minimum=0)
    rate: float = option(4.0, unit="requests/s", help="Poisson arrivals of drawn requests", minimum=0.001)
    prompt_tokens: int = option(2048, unit="tokens", help="mean length of drawn prompts", minimum=1)
    prompt_spread: float = option(0.0, help="standard deviation of the logarithm of their length", minimum=0)
    output_tokens: int = option(256, unit="tokens", help="mean length of drawn answers", minimum=1)
    output_spread: float = option(0.0, help="standard deviation of the logarithm of their length", minimum=0)
    seed: int = option(0, help="seed of everything that is drawn; equal seeds give equal runs", minimum=0)
    json: bool = option(False, help="print JSON instead of a table")

    def __post_init__(self) -> None:
        if self.trace is None and not self.requests:
            raise SettingsError("--requests 0 means all of a trace, and there is no --trace")


@dataclass(frozen=True, slots=True, kw_only=True)
class SloSettings(WorkloadSettings):
    ttft_ms: float = option(1000.0, unit="ms", help="objective: time to the first token", minimum=0.001)
    tpot_ms: float = option(15.0, unit="ms", help="objective: mean time of each later token", minimum=0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings(SloSettings):
    prefill: int = option(1, unit="workers", help="prefill workers", minimum=0)
    decode: int = option(1, unit="workers", help="decode workers", minimum=0)
    mixed: int = option(
        0, unit="workers", help="workers for prompts and answers, by shares that follow the load", minimum=0
    )
    prefill_tp: int = option(1, unit="ranks", help="tensor parallel size of prefill workers", minimum=1, maximum=8)
    prefill_pp: int = option(1, unit="stages", help="pipeline parallel size of prefill workers", minimum=1, maximum=8)
    decode_tp: int = option(
        1, unit="ranks", help="tensor parallel size of decode and mixed workers", minimum=1, maximum=8
    )
    policy: str = option(ROUTING[0], choices=ROUTING, help="how the proxy chooses workers")
    local_prefill: str = option(
        PROXY.local_prefill, choices=LOCAL, help="which prompts decode workers prefill themselves"
    )
    local_prefill_tokens: int = option(16, unit="tokens", help="prompts below this length are short", minimum=0)
    local_prefill_itl_weight: float = option(
        PROXY.local_prefill_itl_weight, help="as the proxy's, with --local-prefill auto", minimum=0
    )
    prefill_policy: str = option(ORDERS[0], choices=ORDERS, help="order of prompts in a prefill worker")
    max_queue: int = option(512, unit="requests", help="most requests that wait in the proxy", minimum=1)
    request_timeout_s: float = option(600.0, unit="s", help="deadline of a request", minimum=0.1)
    store_ram_gib: float = option(0.0, unit="GiB", help="RAM of each host's KV store; 0: no store", minimum=0)
    store_disk_gib: float = option(0.0, unit="GiB", help="disk of each host's KV store; 0: no disk", minimum=0)
    store_loads: str = option(LOADS[0], choices=LOADS, help="when a prefix is loaded from the store")
    adapters: int = option(
        0, unit="adapters", help="LoRA adapters, of which each request names one; 0: none", minimum=0
    )
    adapter_zipf: float = option(
        1.0,
        help="the k-th most frequent adapter is named k to the power of minus this as often as the first",
        minimum=0,
    )
    adapter_mb: float = option(84.0, unit="MB", help="size of each adapter", minimum=0.001)
    max_loras: int = option(32, unit="adapters", help="as the workers'", minimum=1)
    max_cpu_loras: int = option(128, unit="adapters", help="as the workers'", minimum=1)
    step_by_step: bool = option(False, help="make every step of a decode worker an event: the same result, later")


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings(ReplaySettings):
    at: float = option(
        0.5, help="when the worker is killed, as a fraction of the time of all arrivals", minimum=0, maximum=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OverloadSettings(ReplaySettings):
    factor: float = option(3.0, help="multiply the rate (or speed) of the load by this", minimum=0.001)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceSettings(SloSettings):
    gpus: int = option(4, unit="GPUs", help="GPUs to divide among prefill and decode workers", minimum=2)
    tp: tuple[int, ...] = option(
        (1, 2, 4, 8), unit="ranks", help="tensor parallel sizes of workers that are considered", minimum=1, maximum=8
    )
    chunk_tokens: tuple[int, ...] = option(
        (256, 512, 1024, 2048), unit="tokens", help="chunk lengths to try in colocated serving"
    )
    rounds: int = option(3, help="bisections of a factor of two of the rate: how exact it is", minimum=0)
    only: tuple[str, ...] = option((), metavar="NAME", help="only splits of these names, as the table has them")
    first_rate: float = option(
        0.0, unit="requests/s", help="rate to try first; default: three quarters of what work alone allows", minimum=0
    )
    jobs: int = option(0, unit="processes", help="searches at once; 0: as many as there are cores", minimum=0)
    policy: str = option(ROUTING[0], choices=ROUTING, help="how the proxy chooses workers")
    local_prefill: str = option(
        PROXY.local_prefill, choices=LOCAL, help="which prompts decode workers prefill themselves"
    )
    local_prefill_itl_weight: float = option(
        PROXY.local_prefill_itl_weight, help="as the proxy's, with --local-prefill auto", minimum=0
    )
    prefill_policy: str = option(ORDERS[0], choices=ORDERS, help="order of prompts in a prefill worker")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolesSettings(SloSettings):
    gpus: int = option(2, unit="workers", help="workers", minimum=2)
    prefill: tuple[int, ...] = option((), unit="workers", help="splits to try, by prefill workers; default: some")
    policy: str = option("least-loaded", choices=ROUTING, help="how the proxy chooses workers")


@dataclass(frozen=True, slots=True, kw_only=True)
class RampSettings:
    profile: str = option("h100x2-qwen3-32b", help="latency profile: the name of a shipped one, or a JSON file")
    prompt_tokens: int = option(4000, unit="tokens", help="length of prompts", minimum=1)
    output_tokens: int = option(1000, unit="tokens", help="length of answers", minimum=1)
    ttft_ms: float = option(3000.0, unit="ms", help="objective: time to the first token", minimum=0.001)
    tpot_ms: float = option(100.0, unit="ms", help="objective: mean time of each later token", minimum=0.001)
    least: int = option(3, unit="workers", help="fewest workers", minimum=1)
    most: int = option(8, unit="workers", help="most workers", minimum=1)
    start_s: float = option(20.0, unit="s", help="time that a worker takes to start", minimum=0)
    rates: tuple[float, ...] = option((2.0, 4.0, 6.0, 8.0, 10.0, 4.0, 1.0), unit="requests/s", help="of the stages")
    stage_s: tuple[float, ...] = option(
        (330.0, 360.0, 360.0, 360.0, 360.0, 360.0, 300.0), unit="s", help="how long each stage lasts"
    )
    poisson: bool = option(False, help="arrivals by chance; else at even intervals")
    spread: float = option(0.0, help="standard deviation of the logarithm of both lengths", minimum=0)
    seed: int = option(0, help="seed of arrivals and lengths", minimum=0)
    part: float = option(1.0, help="part of the time of each stage", minimum=0.001, maximum=1)
    mixed: bool = option(False, help="workers with adaptive roles; else colocated ones")
    json: bool = option(False, help="print JSON instead of a table")

    def __post_init__(self) -> None:
        if len(self.rates) != len(self.stage_s) or min((*self.rates, *self.stage_s), default=0.0) <= 0:
            raise SettingsError("--rates and --stage-s are as many, and above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TiersSettings:
    trace: Path = option(help="Mooncake trace (JSON lines)")
    profile: str = option("h200-llama-8b", help="latency profile, for the bytes of a token")
    million_tokens: tuple[float, ...] = option((1.0, 3.0, 10.0, 30.0), help="sizes of the tier")
    seed: int = option(0, help="seed of the arrivals within a time stamp", minimum=0)
    json: bool = option(False, help="print JSON instead of a table")


@dataclass(frozen=True, slots=True, kw_only=True)
class FitSettings:
    steps: tuple[Path, ...] = option(metavar="FILE", help="measured steps, as `baton bench steps` writes them")
    profile: str = option("", help="profile whose other numbers go into --out")
    out: Path | None = option(None, help="write that profile with the coefficients found")
    tp: int = option(1, unit="ranks", help="the steps are those of a worker of so many ranks", minimum=1, maximum=8)

    def __post_init__(self) -> None:
        if (self.out is None) == bool(self.profile):
            raise SettingsError("--profile and --out belong together")
