"""What `serve` runs on one machine: proxies, N prefill and M decode workers and a KV store, as command lines.

It owns the settings of `serve` and the plan made from them: which node runs with which arguments, and on which GPU. It
starts nothing: the supervisor runs the plan for `serve`, and `Cluster` for tests, benchmarks and offline use.
"""

from __future__ import annotations

import os
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from baton.launch.gpus import USABLE, Placement, place
from baton.launch.run_folder import RunFolder
from baton.launch.supervisor import ChildSpec
from baton.node.api_settings import KEY_VARIABLE, ApiSettings
from baton.node.engine_settings import EngineSettings, engine_arguments
from baton.node.errors import SettingsError
from baton.node.modelhub import DEMO_MODEL
from baton.node.settings import as_arguments, option

POOL_OPTIONS = ("--gpu-memory-utilization", "--kv-memory-gib", "--num-blocks")
"""Options of a worker with which a user sizes its memory."""
MAX_LORAS = 32
"""Of a worker where adapters are served, unless its arguments say otherwise."""
FOLDER_OPTIONS = ("--load-format", "--max-model-len", "--quantization", "--tp", "--speculate", "--pp")
"""Options of a worker that say what it makes of the model's folder, as `baton.models.check` takes them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings(ApiSettings, EngineSettings):
    """The settings of `serve`; those of ApiSettings are the proxy's, those of EngineSettings each worker's. What is not
    here is passed on with the `_arg` options."""

    model: str = option(
        DEMO_MODEL,
        metavar="MODEL",
        help="the demo model, a Hugging Face model folder, or a hub id org/name",
        positional=True,
    )
    port: int = option(8000, help="port of the HTTP API", minimum=1, maximum=65535)
    prefill: int = option(1, help="number of prefill workers; 0: decode workers prefill too", minimum=0, maximum=64)
    decode: int = option(1, help="number of decode workers", minimum=1, maximum=64)
    roles: str = option(
        "fixed",
        choices=("fixed", "adaptive"),
        help="adaptive: all of these workers compute prompts and answers, by shares that follow the load "
        "(--slo-ttft-ms and --slo-tpot-ms of the proxy)",
    )
    autoscale: bool = option(
        False,
        help="start and drain workers by the replicas that the proxy asks for (--slo-ttft-ms and --slo-tpot-ms of the "
        "proxy)",
    )
    min: int = option(1, unit="workers", help="with --autoscale: fewest workers of a role", minimum=1, maximum=64)
    max: int = option(4, unit="workers", help="with --autoscale: most workers of a role", minimum=1, maximum=64)
    tp: int = option(
        1,
        unit="ranks",
        help="tensor parallel size of each worker: processes that share the model, 1, 2, 4 or 8; on a GPU each",
        minimum=1,
        maximum=8,
    )
    prefill_tp: int | None = option(None, unit="ranks", help="the same of prefill workers", minimum=1, maximum=8)
    decode_tp: int | None = option(None, unit="ranks", help="the same of decode workers", minimum=1, maximum=8)
    prefill_pp: int = option(
        1,
        unit="stages",
        help="pipeline parallel size of each prefill worker: processes that each have some of the layers; on a GPU "
        "each",
        minimum=1,
        maximum=8,
    )
    device: str = option("auto", help="where the model runs", choices=("auto", "cpu", "cuda"))
    gpus: tuple[int, ...] = option(
        (),
        metavar="N",
        minimum=0,
        help="GPUs that the workers take in turn, prefill workers first; workers on one GPU share its memory equally; "
        "default: all that are visible",
    )
    gpu_memory_utilization: float = option(
        USABLE,
        help="share of each GPU's memory that the workers on it may use together, for weights, KV pools and graphs",
        minimum=0.01,
        maximum=0.99,
    )
    local_prefill: str | None = option(
        None,
        help="which prompts decode workers prefill themselves, see `baton proxy --help`; default: auto, or "
        "always with --prefill 0",
        choices=("never", "short", "auto", "always"),
    )
    store_ram_gib: float = option(
        0.25, unit="GiB", help="RAM of the KV store that the workers share; 0: no store", minimum=0
    )
    store_disk_gib: float = option(
        0.0, unit="GiB", help="disk space of the KV store, for each model; 0: no disk", minimum=0
    )
    store_path: Path = option(Path("kvstore"), metavar="FOLDER", help="where the KV store keeps blocks on disk")
    proxy_arg: tuple[str, ...] = option(
        (), metavar="ARGUMENT", help="argument for the proxy, as in --proxy-arg=--log-level=debug"
    )
    worker_arg: tuple[str, ...] = option(
        (), metavar="ARGUMENT", help="argument for each worker, as in --worker-arg=--num-blocks=512"
    )
    prefill_arg: tuple[str, ...] = option((), metavar="ARGUMENT", help="argument for each prefill worker")
    decode_arg: tuple[str, ...] = option((), metavar="ARGUMENT", help="argument for each decode worker")
    store_arg: tuple[str, ...] = option((), metavar="ARGUMENT", help="argument for the KV store")
    start_timeout_s: float = option(600.0, unit="s", help="time limit for the start, up to the first token", minimum=1)
    grace_s: float = option(45.0, unit="s", help="time for processes to drain before they are killed", minimum=0)

    def __post_init__(self) -> None:
        ApiSettings.__post_init__(self)  # super() does not work in a class with slots
        if self.min > self.max:
            raise SettingsError(f"--min {self.min} is more than --max {self.max}")
        if self.roles == "adaptive" and (self.prefill_tp or self.decode_tp):
            raise SettingsError("--prefill-tp and --decode-tp: with --roles adaptive all workers have --tp ranks")
        if self.roles == "adaptive" and self.prefill_pp > 1:
            raise SettingsError("--prefill-pp: with --roles adaptive all workers decode, and those have one stage")

    def ranks_of(self, role: str) -> int:
        """Of each worker of a role, in each of its stages."""
        return {"prefill": self.prefill_tp, "decode": self.decode_tp}.get(role) or self.tp

    def stages_of(self, role: str) -> int:
        """Of each worker of a role."""
        return self.prefill_pp if role == "prefill" else 1

    @property
    def largest(self) -> ServeSettings:
        """With as many workers of each role as --autoscale may start."""
        if not self.autoscale:
            return self
        if self.roles == "adaptive":
            return replace(self, prefill=0, decode=max(self.max, self.prefill + self.decode))
        prefill = max(self.max, self.prefill) if self.prefill else 0
        return replace(self, prefill=prefill, decode=max(self.max, self.decode))


@dataclass(frozen=True, slots=True)
class Ports:
    """TCP ports of the loopback interface: the control socket of each proxy, and the store's. Workers choose their own.

    `secret_file`: of the links between nodes. `group_folder`: where several proxies ask one another, and the launcher
    asks a proxy of which it has no key."""

    controls: tuple[int, ...]
    store: int
    secret_file: Path
    group_folder: Path | None = None

    @classmethod
    def free(cls, settings: ServeSettings, folder: RunFolder) -> Ports:
        """Ports that are free now."""
        store, *controls = free_ports(1 + settings.proxies)
        group_folder = folder.path if needs_folder(settings) else None
        return cls(tuple(controls), store, folder.secret_file, group_folder)

    @property
    def control(self) -> int:
        """Of the first proxy, mostly the only one."""
        return self.controls[0]

    @property
    def control_addresses(self) -> list[str]:
        return [f"tcp://127.0.0.1:{control}" for control in self.controls]

    @property
    def store_address(self) -> str:
        return f"tcp://127.0.0.1:{self.store}"


def needs_folder(settings: ServeSettings) -> bool:
    """Whether proxies are asked at sockets of their own."""
    return settings.proxies > 1 or settings.tenants is not None


def worker_names(settings: ServeSettings) -> list[tuple[str, str]]:
    """Role and name of each worker, prefill workers first."""
    if settings.roles == "adaptive":
        return [("mixed", f"mixed-{index}") for index in range(settings.prefill + settings.decode)]
    prefill = [("prefill", f"prefill-{index}") for index in range(settings.prefill)]
    return prefill + [("decode", f"decode-{index}") for index in range(settings.decode)]


def place_workers(settings: ServeSettings, num_visible: int) -> dict[str, Placement]:
    """The GPU of each worker, and its share of the memory; empty on a CPU.

    Raises SettingsError for a GPU that was asked for and is not there.
    """
    asked = f"--gpus {' '.join(map(str, settings.gpus))}" if settings.gpus else "--device cuda"
    if not num_visible and settings.device != "cpu" and (settings.gpus or settings.device == "cuda"):
        raise SettingsError(
            f"{asked}: no GPU is visible here, because there is no NVIDIA driver, CUDA_VISIBLE_DEVICES hides them, or "
            "this torch is a build for CPUs; leave the option out to serve on the CPU"
        )
    gpus = settings.gpus or tuple(range(num_visible))
    if num_visible and max(gpus, default=0) >= num_visible:
        raise SettingsError(f"--gpus {max(gpus)}: {num_visible} GPUs are visible, counted from 0")
    workers = {name: settings.ranks_of(role) * settings.stages_of(role) for role, name in worker_names(settings)}
    return place(workers, gpus if settings.device != "cpu" else (), settings.gpu_memory_utilization)


def plan_nodes(
    settings: ServeSettings, ports: Ports, placements: Mapping[str, Placement], environ: Mapping[str, str]
) -> list[ChildSpec]:
    """The processes to run. Only the proxies get the API keys, by their environment."""
    env = node_environment(settings, environ)
    specs = [_proxy(settings, ports, index, env) for index in range(settings.proxies)]
    if settings.store_ram_gib:
        specs.append(_store(settings, ports, env))
    return specs + [
        plan_worker(settings, ports, role, name, placements.get(name), env) for role, name in worker_names(settings)
    ]


def node_environment(settings: ServeSettings, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without the API keys, with as many threads a rank of a worker as the cores suffice for."""
    env = {name: value for name, value in environ.items() if name != KEY_VARIABLE}
    env |= {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive"}
    ranks = sum(settings.ranks_of(role) * settings.stages_of(role) for role, _ in worker_names(settings))
    env.setdefault("OMP_NUM_THREADS", str(threads_per_rank(len(_cores()), ranks, settings.proxies)))
    return env


def plan_worker(
    settings: ServeSettings, ports: Ports, role: str, name: str, placement: Placement | None, env: Mapping[str, str]
) -> ChildSpec:
    """One worker. The user's arguments come last, so they overrule the share of a GPU."""
    gpu = ("--gpu", str(placement.gpu), "--gpu-memory-utilization", str(placement.share)) if placement else ()
    arguments = (
        *("--model", settings.model, "--proxy", *ports.control_addresses, "--device", settings.device),
        *("--worker-id", name, "--secret-file", str(ports.secret_file)),
        *(("--tp", str(settings.ranks_of(role))) if settings.ranks_of(role) > 1 else ()),
        *(("--pp", str(settings.stages_of(role))) if settings.stages_of(role) > 1 else ()),
        *gpu,
        *(("--max-loras", str(MAX_LORAS)) if settings.lora_modules or settings.adapter_root else ()),
        *(("--store", ports.store_address) if settings.store_ram_gib else ()),
        *engine_arguments(settings),
        *settings.worker_arg,
        *(settings.prefill_arg if role == "prefill" else settings.decode_arg),
    )
    if role == "mixed":
        return _node(name, role, "baton.decode", ("--mixed", *arguments), env)
    return _node(name, role, f"baton.{role}", arguments, env)


def folder_options(settings: ServeSettings) -> set[tuple[str, ...]]:
    """What the workers' arguments say of the model's folder, in the order of FOLDER_OPTIONS."""
    given = []
    for role in {role for role, _ in worker_names(settings)}:
        of_role = settings.prefill_arg if role == "prefill" else settings.decode_arg
        sizes = f"--tp={settings.ranks_of(role)}", f"--pp={settings.stages_of(role)}"
        given.append((*sizes, *engine_arguments(settings), *settings.worker_arg, *of_role))
    return {tuple(_last(arguments, name) for name in FOLDER_OPTIONS) for arguments in given}


def _last(arguments: Sequence[str], option_name: str) -> str:
    """The value that counts of an option, written as two arguments or one; empty where it is not given."""
    value = ""
    for argument, following in zip(arguments, (*arguments[1:], ""), strict=False):
        name, equals, joined = argument.partition("=")
        if name == option_name:
            value = joined if equals else following
    return value


def sizes_pools(settings: ServeSettings) -> bool:
    """Whether the user sizes the memory of workers, so that the planned shares do not hold for all."""
    given = (*settings.worker_arg, *settings.prefill_arg, *settings.decode_arg)
    return any(argument.split("=")[0] in POOL_OPTIONS for argument in given)


def _proxy(settings: ServeSettings, ports: Ports, index: int, env: Mapping[str, str]) -> ChildSpec:
    local_prefill = settings.local_prefill or ("" if settings.prefill else "always")
    api = {field.name: getattr(settings, field.name) for field in fields(ApiSettings) if field.name != "api_key"}
    api["served_model_name"] = settings.served_model_name or (served_name(settings),)
    arguments = (
        *("--model", settings.model, "--control-address", ports.control_addresses[index]),
        *("--secret-file", str(ports.secret_file)),
        *as_arguments(ApiSettings, api),
        *(("--local-prefill", local_prefill) if local_prefill else ()),
        *(("--proxy-index", str(index), "--group-folder", str(ports.group_folder)) if ports.group_folder else ()),
        *settings.proxy_arg,
    )
    key = {KEY_VARIABLE: "\n".join(settings.api_key)} if settings.api_key else {}
    name = "proxy" if settings.proxies == 1 else f"proxy-{index}"
    return _node(name, "proxy", "baton.proxy", arguments, {**env, **key})


def _store(settings: ServeSettings, ports: Ports, env: Mapping[str, str]) -> ChildSpec:
    """The store is optional: serving goes on where it cannot be kept alive."""
    disk = ("--disk-gib", str(settings.store_disk_gib), "--path", str(settings.store_path))
    arguments = (
        *("--store-id", "store", "--proxy", *ports.control_addresses, "--bind", ports.store_address),
        *("--secret-file", str(ports.secret_file)),
        *("--ram-gib", str(settings.store_ram_gib)),
        *(disk if settings.store_disk_gib else ()),
        *settings.store_arg,
    )
    return _node("store", "store", "baton.kvtransfer", arguments, env, needed=False)


def _node(
    name: str, group: str, module: str, arguments: Sequence[str], env: Mapping[str, str], needed: bool = True
) -> ChildSpec:
    return ChildSpec(
        name=name, group=group, argv=(sys.executable, "-P", "-m", module, *arguments), env=env, needed=needed
    )


def served_name(settings: ServeSettings) -> str:
    return served_name_of(settings.served_model_name, settings.model)


def served_name_of(names: Sequence[str], model: str) -> str:
    """What clients call the model: the first of its names."""
    if names:
        return names[0]
    folder = Path(model).expanduser()
    return folder.resolve().name if model != DEMO_MODEL and folder.is_dir() else model


def scheme(settings: ServeSettings) -> str:
    """Of the API's URL."""
    return "http" if settings.tls_cert is None else "https"


def threads_per_rank(num_cores: int, num_ranks: int, num_proxies: int = 1) -> int:
    """Cores divided evenly, less one for each proxy: more threads than cores wait for each other."""
    return max(1, (num_cores - num_proxies) // max(1, num_ranks))


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def free_ports(count: int) -> list[int]:
    """So many different free ports."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)


def free_port() -> int:
    """A free port of the loopback interface, chosen before the proxy binds it since workers need it as an argument.

    It is below the range from which systems assign ports, so that no other process gets it in the meantime.
    """
    for _ in range(100):
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise SettingsError("no free port between 20000 and 29999 on 127.0.0.1")
