"""Guards node.settings: every field type becomes an option; every wrong argument is one clear line and status 2."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from baton.node.errors import SettingsError
from baton.node.settings import option, parse, require_loopback


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One field of every kind."""

    model: str = option(help="model folder or hub id")
    port: int = option(8000, help="HTTP port", minimum=1, maximum=65535)
    drain_s: float = option(10.0, help="time to end requests", unit="s", minimum=0)
    device: str = option("auto", help="where the model runs", choices=("auto", "cpu", "cuda"))
    insecure_network: bool = option(False, help="allow network addresses")
    prefix_cache: bool = option(True, help="keep blocks")
    folder: Path = option(Path("."), help="folder")
    extra: tuple[str, ...] = option((), help="more")
    sizes: tuple[int, ...] = option((1, 2), help="sizes", minimum=1)
    num_blocks: int | None = option(None, help="blocks", minimum=1)
    api_key: str = option("", help="100% secret", env="EXAMPLE_KEY")


def read(*argv: str, **environ: str) -> Example:
    return parse(Example, argv, prog="example", description="An example.", environ=environ)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, **environ: str) -> str:
    """The one-line error that wrong arguments print."""
    with pytest.raises(SystemExit) as ended:
        read(*argv, **environ)
    assert ended.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@dataclass(frozen=True, slots=True, kw_only=True)
class Separate:
    """A tuple that takes one value each time, beside a positional argument."""

    model: str = option("demo", help="model", positional=True)
    name: tuple[str, ...] = option((), help="name", separate=True, env="EXAMPLE_NAMES")


def test_a_separate_option_leaves_the_positional_argument_alone() -> None:
    """`serve --served-model-name x MODEL` would serve another model, under two names."""

    def read(*argv: str, **environ: str) -> Separate:
        return parse(Separate, argv, prog="example", description="", environ=environ)

    assert read("--name", "x", "m") == Separate(model="m", name=("x",))
    assert read("m", "--name", "x", "--name", "y", EXAMPLE_NAMES="z") == Separate(model="m", name=("x", "y"))
    assert read(EXAMPLE_NAMES="x\ny z\n") == Separate(name=("x", "y z"))


def test_defaults_are_those_of_the_dataclass() -> None:
    """Guards against a default lost in argparse, which would silently change a node's behaviour."""
    assert read("--model", "m") == Example(model="m")


def test_every_kind_of_option_is_read() -> None:
    """Guards against a string where a number is expected."""
    argv = "--model m --port 9 --drain-s 1.5 --device cpu --insecure-network --no-prefix-cache --folder a/b"
    assert read(*argv.split(), "--extra=--x=1", "--extra", "y", "--sizes", "7", "--num-blocks", "5") == Example(
        model="m",
        port=9,
        drain_s=1.5,
        device="cpu",
        insecure_network=True,
        prefix_cache=False,
        folder=Path("a/b"),
        extra=("--x=1", "y"),
        sizes=(7,),
        num_blocks=5,
    )


def test_a_repeated_option_replaces_its_default_and_never_leaks_into_the_next_parse() -> None:
    """Guards against argparse's `append`, which extends the shared default list."""
    assert read("--model", "m", "--sizes", "7", "--sizes", "8").sizes == (7, 8)
    assert read("--model", "m", "--sizes", "7", "8", "--sizes", "9").sizes == (7, 8, 9)
    assert read("--model", "m").sizes == (1, 2)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "--model"),
        (["--model", "m", "--port", "0"], "--port: must be at least 1, not 0"),
        (["--model", "m", "--port", "65536"], "--port: must be at most 65535, not 65536"),
        (["--model", "m", "--port", "80x"], "--port: must be a whole number, not '80x'"),
        (["--model", "m", "--port", "1e3"], "--port: must be a whole number, not '1e3'"),
        (["--model", "m", "--drain-s", "-1"], "--drain-s: must be at least 0 s, not -1.0"),
        (["--model", "m", "--drain-s", "nan"], "--drain-s: must be a finite number, not nan"),
        (["--model", "m", "--drain-s", "inf"], "--drain-s: must be a finite number, not inf"),
        (["--model", "m", "--drain-s", "soon"], "--drain-s: must be a number, not 'soon'"),
        (["--model", "m", "--device", "tpu"], "--device: must be one of auto, cpu, cuda, not 'tpu'"),
        (["--model", "m", "--sizes", "0"], "--sizes: must be at least 1"),
        (["--model", "m", "--num-blocks", "0"], "--num-blocks: must be at least 1"),
        (["--model", "m", "--por", "9"], "--por"),
        (["--model", "m", "stray"], "stray"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(
    capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    """Guards against values out of bounds failing far from their cause, and against abbreviated options."""
    assert said in error_of(capsys, *argv)


def test_an_option_of_another_program_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards users who come from there: "unrecognized" alone does not say what the option is called here."""
    with pytest.raises(SystemExit):
        parse(
            Example, ["--model", "m", "--tp-size=2"], prog="p", description="", hints={"--tp-size": "here it is --tp"}
        )
    assert "unrecognized arguments: --tp-size=2; --tp-size: here it is --tp (see --help)" in capsys.readouterr().err


@dataclass(frozen=True, slots=True, kw_only=True)
class WithPositional:
    model: str = option("demo", help="model", metavar="MODEL", positional=True)
    gpus: tuple[int, ...] = option((), help="GPUs")


@pytest.mark.parametrize(
    ("argv", "model"),
    [
        ([], "demo"),
        (["org/name"], "org/name"),
        (["--model", "org/name"], "org/name"),
        (["org/name", "--gpus", "0", "1"], "org/name"),
        (["--gpus=0", "org/name"], "org/name"),
        (["org/name", "--model", "org/name"], "org/name"),
    ],
)
def test_a_positional_argument_sets_the_option(argv: list[str], model: str) -> None:
    """Guards `serve MODEL`, the form that other servers use."""
    assert parse(WithPositional, argv, prog="example", description="", environ={}).model == model


def test_two_different_values_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against serving the wrong one of two given models."""
    with pytest.raises(SystemExit):
        parse(WithPositional, ["a", "--model", "b"], prog="example", description="", environ={})
    assert "two values for model: 'a' and 'b'" in capsys.readouterr().err


def test_help_names_every_option_with_unit_default_and_bounds(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against help that fails on a percent sign or omits a default."""
    with pytest.raises(SystemExit) as ended:
        read("--help", EXAMPLE_KEY="hunter2")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for wanted in (
        "--model TEXT model folder or hub id (required)",
        "--port N HTTP port (default 8000, 1 to 65535)",
        "--drain-s X time to end requests (in s, default 10.0, at least 0)",
        "--device {auto,cpu,cuda}",
        "--no-prefix-cache keep blocks (default on)",
        "--sizes N [N ...] sizes (one or more, default 1,2, at least 1)",
        "100% secret (also read from EXAMPLE_KEY)",
    ):
        assert wanted in text
    assert "hunter2" not in text


def test_the_environment_gives_a_default_that_the_command_line_overrides() -> None:
    """Guards secrets: on the command line they are visible to every user of the machine."""
    assert read("--model", "m", EXAMPLE_KEY="k").api_key == "k"
    assert read("--model", "m", "--api-key", "other", EXAMPLE_KEY="k").api_key == "other"


def test_a_variable_of_the_environment_is_checked_like_an_argument(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards against unchecked values from the environment."""

    @dataclass(frozen=True)
    class FromEnv:
        size: int = option(1, help="size", minimum=1, env="SIZE")

    with pytest.raises(SystemExit):
        parse(FromEnv, [], prog="x", description="", environ={"SIZE": "0"})
    assert "SIZE: must be at least" in capsys.readouterr().err


def test_an_error_of_post_init_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Guards checks across two fields, which must not end in a traceback."""

    @dataclass(frozen=True)
    class Refusing:
        low: int = option(1, help="low")

        def __post_init__(self) -> None:
            raise SettingsError("low is above high")

    with pytest.raises(SystemExit) as ended:
        parse(Refusing, [], prog="x", description="")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "x: error: low is above high (see --help)\n"


def test_an_unsupported_field_type_is_a_type_error() -> None:
    """Guards against reading a dict or a nested tuple as text."""

    @dataclass(frozen=True)
    class Odd:
        names: dict[str, str] = option(None, help="?")

    with pytest.raises(TypeError, match="names"):
        parse(Odd, [], prog="x", description="")


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.9.1",
        "::1",
        "localhost",
    ],
)
def test_loopback_is_accepted(address: str) -> None:
    """Guards the default bind address, which needs no option."""
    require_loopback(address, insecure_network=False)


@pytest.mark.parametrize(
    "address",
    ["", "0.0.0.0", "::", "10.0.0.1", "*", "eth0", "gpu-host", "127.0.0.1.example.com", "localhost.example.com"],
)
def test_a_network_address_is_refused_unless_asked_for(address: str) -> None:
    """Guards against an unauthenticated port that is open to the network."""
    with pytest.raises(SettingsError, match="--insecure-network"):
        require_loopback(address, insecure_network=False)
    require_loopback(address, insecure_network=True)
