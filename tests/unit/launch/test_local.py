"""Guards launch.local: the command lines of the nodes, their shares of a GPU, and which of them gets the API key."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest

from baton.decode.settings import DecodeSettings
from baton.launch import local
from baton.launch.local import ServeSettings
from baton.launch.other_options import OPTIONS_OF_OTHERS
from baton.launch.run_folder import RunFolder
from baton.launch.supervisor import ChildSpec
from baton.node.errors import SettingsError
from baton.proxy.settings import ProxySettings

SECRET = Path("run/secret")
PORTS = local.Ports(controls=(777,), store=778, secret_file=SECRET)


def plan(settings: ServeSettings, environ: Mapping[str, str] | None = None) -> list[ChildSpec]:
    """On a machine without GPUs, but for those that are given."""
    return local.plan_nodes(settings, PORTS, local.place_workers(settings, 0), environ or {})


def options_of(argv: tuple[str, ...]) -> list[str]:
    return list(argv[argv.index("-m") + 1 :])


def test_each_role_gets_the_options_that_it_has() -> None:
    """Guards against a worker with a wrong proxy address or a duplicate name, which never serves."""
    settings = ServeSettings(model="m", port=9, prefill=2, device="cpu", worker_arg=("--num-blocks=5",))
    specs = plan(settings)
    assert [(spec.name, spec.group) for spec in specs] == [
        ("proxy", "proxy"),
        ("store", "store"),
        ("prefill-0", "prefill"),
        ("prefill-1", "prefill"),
        ("decode-0", "decode"),
    ]
    address = "tcp://127.0.0.1:777"
    secret, api = ["--secret-file", str(SECRET)], ["--served-model-name=m", "--port=9"]
    assert options_of(specs[0].argv) == ["baton.proxy", "--model", "m", "--control-address", address, *secret, *api]
    store = "tcp://127.0.0.1:778"
    assert options_of(specs[1].argv) == (
        ["baton.kvtransfer", "--store-id", "store", "--proxy", address, "--bind", store, *secret, "--ram-gib", "0.25"]
    )
    worker = ["--model", "m", "--proxy", address, "--device", "cpu", "--worker-id", "prefill-1", *secret]
    assert options_of(specs[3].argv) == ["baton.prefill", *worker, "--store", store, "--num-blocks=5"]


def test_options_of_engines_reach_each_worker_before_its_own() -> None:
    """Guards `serve MODEL --max-model-len 512`, as users of other servers write it; --worker-arg and those of a role
    overrule it."""
    settings = ServeSettings(
        model="m", device="cpu", max_model_len=512, dtype="bfloat16", decode_arg=("--max-model-len=64",)
    )
    plans = {spec.name: options_of(spec.argv) for spec in plan(settings)}
    for name in ("prefill-0", "decode-0"):
        assert "--max-model-len=512" in plans[name] and "--dtype=bfloat16" in plans[name]
    assert plans["decode-0"][-1] == "--max-model-len=64"
    assert not any("--max-model-len" in each or "--dtype" in each for each in plans["proxy"] + plans["store"])
    lengths = {each[local.FOLDER_OPTIONS.index("--max-model-len")] for each in local.folder_options(settings)}
    assert lengths == {"512", "64"}


def test_hints_name_options_that_exist() -> None:
    """Guards the errors for options of other programs against options that are renamed here."""
    names = {
        cls: {f"--{each.name.replace('_', '-')}" for each in fields(cls)}
        for cls in (ServeSettings, ProxySettings, DecodeSettings)
    }
    for option, hint in OPTIONS_OF_OTHERS.items():
        assert option not in names[ServeSettings]
        assert set(re.findall(r"--[a-z][a-z-]*", hint)) <= set.union(*names.values()) | {"--worker-arg", "--proxy-arg"}
    for option in (name for name, hint in OPTIONS_OF_OTHERS.items() if hint.startswith("goes behind")):
        assert option in names[ProxySettings if "proxy" in OPTIONS_OF_OTHERS[option] else DecodeSettings], option


def test_workers_have_slots_where_adapters_are_served() -> None:
    """Guards against adapters that no worker takes; what the user says of slots comes last, and so counts."""
    named = ServeSettings(model="m", lora_modules=("a=/a", "b=/b"), device="cpu", worker_arg=("--max-loras=4",))
    for settings in (named, ServeSettings(model="m", adapter_root=Path("/r"), device="cpu")):
        _, _, *workers = (options_of(spec.argv) for spec in plan(settings))
        assert {tuple(each[each.index("--max-loras") :][:2]) for each in workers} == {("--max-loras", "32")}
    assert options_of(plan(named)[2].argv)[-1] == "--max-loras=4"
    proxy = options_of(plan(named)[0].argv)
    assert [each for each in proxy if "lora" in each] == ["--lora-modules=a=/a", "--lora-modules=b=/b"]


def test_several_proxies_share_the_port_and_have_all_workers(tmp_path: Path) -> None:
    """Guards against a worker or a store that one of the proxies never sees, and two proxies that are one to others."""
    settings = ServeSettings(proxies=2, prefill=0, device="cpu", max_requests=7)
    ports = local.Ports((777, 779), 778, SECRET, tmp_path)
    proxy_0, proxy_1, store, worker = local.plan_nodes(settings, ports, {}, {})
    assert [spec.name for spec in (proxy_0, proxy_1)] == ["proxy-0", "proxy-1"] and proxy_1.group == "proxy"
    for index, (spec, control) in enumerate([(proxy_0, 777), (proxy_1, 779)]):
        options = dict(zip(spec.argv, spec.argv[1:], strict=False))
        assert options["--control-address"] == f"tcp://127.0.0.1:{control}"
        assert (options["--proxy-index"], options["--group-folder"]) == (str(index), str(tmp_path))
        assert {"--proxies=2", "--max-requests=7"} <= set(spec.argv)
    for spec in (store, worker):
        at = spec.argv.index("--proxy")
        assert spec.argv[at + 1 : at + 3] == ("tcp://127.0.0.1:777", "tcp://127.0.0.1:779")


def test_one_proxy_is_in_no_group() -> None:
    """Guards the one proxy, which needs no socket for others; but the launcher has no key of a tenant."""
    with RunFolder() as folder:
        assert local.Ports.free(ServeSettings(), folder).group_folder is None
        assert local.Ports.free(ServeSettings(tenants=Path("file")), folder).group_folder == folder.path
        ports = local.Ports.free(ServeSettings(proxies=3), folder)
    assert ports.group_folder == folder.path and len({ports.store, *ports.controls}) == 4


def gpu_options(settings: ServeSettings, num_visible: int) -> dict[str, tuple[str, str]]:
    """The number of the GPU and the share of its memory that each worker gets; the last one given counts."""
    specs = local.plan_nodes(settings, PORTS, local.place_workers(settings, num_visible), {})
    found = {}
    for spec in specs:
        if "--gpu" in spec.argv:
            options = dict(zip(spec.argv, spec.argv[1:], strict=False))
            found[spec.name] = options["--gpu"], options["--gpu-memory-utilization"]
    return found


def test_workers_on_one_gpu_share_its_memory() -> None:
    """The prefill worker took all of the only GPU, and decode could not start."""
    assert gpu_options(ServeSettings(), 1) == {"prefill-0": ("0", "0.45"), "decode-0": ("0", "0.45")}
    shares = [share for _, share in gpu_options(ServeSettings(prefill=3, decode=4), 1).values()]
    assert len(shares) == 7 and sum(map(float, shares)) <= 0.9001


def test_two_gpus_are_used_one_each() -> None:
    """Two workers on one GPU while another idles would halve what the machine gives."""
    assert gpu_options(ServeSettings(), 2) == {"prefill-0": ("0", "0.9"), "decode-0": ("1", "0.9")}


def test_the_users_gpus_override_the_plan() -> None:
    """Some GPUs may belong to other programs."""
    given = gpu_options(ServeSettings(prefill=2, decode=1, device="cuda", gpus=(0, 3)), 4)
    assert given == {"prefill-0": ("0", "0.45"), "prefill-1": ("3", "0.9"), "decode-0": ("0", "0.45")}
    with pytest.raises(SettingsError, match=r"--gpus 3: 2 GPUs are visible"):
        local.place_workers(ServeSettings(gpus=(0, 3)), 2)


def test_the_users_sizes_override_the_share() -> None:
    """An argument of the user must come after the planned one, of which it says the opposite."""
    settings = ServeSettings(worker_arg=("--gpu-memory-utilization", "0.2"), decode_arg=("--num-blocks=5",))
    assert gpu_options(settings, 1)["prefill-0"] == ("0", "0.2")
    assert plan(settings)[-1].argv[-1] == "--num-blocks=5" and plan(settings)[-2].argv[-1] == "0.2"
    assert local.sizes_pools(settings) and not local.sizes_pools(ServeSettings(worker_arg=("--block-tokens=64",)))


@pytest.mark.parametrize(
    ("settings", "said"), [(ServeSettings(gpus=(0, 1)), "--gpus 0 1"), (ServeSettings(device="cuda"), "--device cuda")]
)
def test_a_gpu_that_is_asked_for_must_be_there(settings: ServeSettings, said: str) -> None:
    """`--gpus 0` on a machine without one served on its CPU, a hundred times slower, without a word."""
    with pytest.raises(SettingsError, match=f"{said}: no GPU is visible"):
        local.place_workers(settings, 0)


@pytest.mark.parametrize("settings", [ServeSettings(device="cpu", gpus=(0,)), ServeSettings()])
def test_a_cpu_has_no_shares(settings: ServeSettings) -> None:
    """Lines about GPUs on a machine without one would be wrong."""
    assert gpu_options(settings, 0) == {}


def test_the_store_follows_the_settings_and_is_optional() -> None:
    """A store that cannot be kept alive must not end the serving; without RAM for one, none is started."""
    specs = plan(ServeSettings(store_disk_gib=2, store_path=Path("d")))
    assert options_of(specs[1].argv)[-4:] == ["--disk-gib", "2", "--path", "d"]
    assert [spec.name for spec in specs if not spec.needed] == ["store"]
    specs = plan(ServeSettings(store_ram_gib=0))
    assert "store" not in [spec.name for spec in specs] and "--store" not in specs[1].argv


def test_the_served_model_name_is_not_a_path(tmp_path: Path) -> None:
    """Guards against exposing the server's paths, which also differ between machines."""
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert local.served_name(ServeSettings(model=f"{folder}/")) == "my-model"
    assert local.served_name(ServeSettings(model="org/name")) == "org/name"
    assert local.served_name(ServeSettings()) == "demo"
    assert local.served_name(ServeSettings(served_model_name=("x", "y"))) == "x"


def test_without_prefill_workers_decode_workers_prefill() -> None:
    """Guards `--prefill 0` against waiting forever for a prefill worker."""
    argv = plan(ServeSettings(prefill=0))[0].argv
    assert argv[argv.index("--local-prefill") + 1] == "always"
    argv = plan(ServeSettings(prefill=0, local_prefill="short"))[0].argv
    assert argv[argv.index("--local-prefill") + 1] == "short"


def test_the_key_is_in_no_command_line_and_only_the_proxy_has_it() -> None:
    """Every user of the machine can read command lines."""
    specs = plan(ServeSettings(api_key=("hunter2",)))
    assert not any("hunter2" in argument for spec in specs for argument in spec.argv)
    assert [spec.name for spec in specs if "hunter2" in spec.env.values()] == ["proxy"]
    inherited = plan(ServeSettings(api_key=("hunter2",)), {"BATON_API_KEY": "hunter2"})
    assert [spec.name for spec in inherited if "hunter2" in spec.env.values()] == ["proxy"]


@pytest.mark.parametrize(
    ("cores", "workers", "proxies", "threads"),
    [(1, 2, 1, 1), (2, 2, 1, 1), (8, 2, 1, 3), (64, 1, 1, 63), (4, 8, 1, 1), (8, 2, 4, 2), (2, 1, 4, 1)],
)
def test_threads_of_all_workers_fit_the_cores(cores: int, workers: int, proxies: int, threads: int) -> None:
    """Two workers with a thread a core each run at a fraction of their speed."""
    assert local.threads_per_rank(cores, workers, proxies) == threads


def test_a_number_of_threads_that_the_user_set_is_kept() -> None:
    """It was set for a reason."""
    spec = plan(ServeSettings(), {"OMP_NUM_THREADS": "5"})[-1]
    assert spec.env["OMP_NUM_THREADS"] == "5"


@pytest.mark.parametrize("role", ["proxy", "prefill", "decode", "store"])
def test_the_roles_have_the_options_that_they_are_given(role: str) -> None:
    """An option renamed in a role would only be found by starting everything; a key not read is no protection."""
    module = importlib.import_module("baton.kvtransfer.store.settings" if role == "store" else f"baton.{role}.settings")
    fields = getattr(module, f"{role.capitalize()}Settings").__dataclass_fields__
    settings = ServeSettings(prefill=1, local_prefill="short", insecure_network=True, store_disk_gib=1, gpus=(0,))
    specs = local.plan_nodes(settings, PORTS, local.place_workers(settings, 1), {})
    argv = next(spec.argv for spec in specs if spec.group == role)
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    assert given <= set(fields)
    if role == "proxy":
        assert fields["api_key"].metadata["option"].env == "BATON_API_KEY"


def test_each_role_has_its_number_of_ranks() -> None:
    """Guards against a size of one role that the workers of another get, and more threads than cores."""

    def sizes(settings: ServeSettings, name: str = "--tp") -> dict[str, str]:
        argvs = {spec.name: spec.argv for spec in plan(settings) if spec.group in ("prefill", "decode", "mixed")}
        return {worker: argv[argv.index(name) + 1] if name in argv else "1" for worker, argv in argvs.items()}

    cpu = {"device": "cpu"}
    assert sizes(ServeSettings(**cpu)) == {"prefill-0": "1", "decode-0": "1"}
    assert sizes(ServeSettings(tp=2, prefill_tp=1, **cpu)) == {"prefill-0": "1", "decode-0": "2"}
    assert sizes(ServeSettings(decode_tp=4, **cpu)) == {"prefill-0": "1", "decode-0": "4"}
    assert sizes(ServeSettings(tp=2, roles="adaptive", **cpu)) == {"mixed-0": "2", "mixed-1": "2"}
    assert sizes(ServeSettings(prefill_pp=2, tp=2, **cpu), "--pp") == {"prefill-0": "2", "decode-0": "1"}
    options = local.folder_options(ServeSettings(prefill_tp=2, prefill_pp=3))
    assert options == {("", "", "", "2", "", "3"), ("", "", "", "1", "", "1")}
    (env,) = {spec.env["OMP_NUM_THREADS"] for spec in plan(ServeSettings(prefill_pp=8, tp=8, **cpu)) if spec.env}
    assert env == "1"
    with pytest.raises(SettingsError, match="--prefill-tp and --decode-tp"):
        ServeSettings(roles="adaptive", prefill_tp=2)
    placed = local.place_workers(ServeSettings(tp=2), 4)
    assert [list(placed[name].gpus) for name in ("prefill-0", "decode-0")] == [[0, 1], [2, 3]]
    with pytest.raises(SettingsError, match="--prefill-pp: with --roles adaptive"):
        ServeSettings(roles="adaptive", prefill_pp=2)
    placed = local.place_workers(ServeSettings(prefill_pp=2), 3)
    assert [list(placed[name].gpus) for name in ("prefill-0", "decode-0")] == [[0, 1], [2]]


def test_proxies_may_start_without_workers() -> None:
    """Guards against a plan that asks for the size of the largest worker where there is none."""
    assert [spec.name for spec in plan(ServeSettings(prefill=0, decode=0, store_ram_gib=0.0))] == ["proxy"]
