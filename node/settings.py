"""Settings: one frozen dataclass a node; the command line is generated from it, and an error is one line.

Only this module reads the command line and the environment. It does not know any node: `option` describes a field,
`parse` turns arguments into an instance of any dataclass of such fields, `require_loopback` checks a bind address.

    @dataclass(frozen=True, slots=True, kw_only=True)
    class ProxySettings:
        model: str = option(help="model folder or hub id")                                     # required: --model
        port: int = option(8000, help="HTTP port", minimum=0, maximum=65535)                   # --port
        drain_s: float = option(10.0, unit="s", help="time for running requests to finish", minimum=0)

    settings = parse(ProxySettings, sys.argv[1:], prog="baton proxy", description="The HTTP front of Baton.")
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from baton.node.errors import SettingsError

T = TypeVar("T")

_METADATA_KEY = "option"
_POSITIONAL = " positional"
_METAVARS: dict[type, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH"}


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """A field's metadata: everything but its name, type and default."""

    help: str
    unit: str = ""
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    metavar: str = ""
    env: str = ""
    """Environment variable that gives the default: for secrets, which do not belong in a process list."""
    positional: bool = False
    """The value may also be the argument without an option's name."""
    separate: bool = False
    """Of a tuple: the option takes one value each time it is given, so that a positional argument may follow it."""


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    unit: str = "",
    choices: Sequence[str] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    metavar: str = "",
    env: str = "",
    positional: bool = False,
    separate: bool = False,
) -> Any:
    """A dataclass field that becomes `--its-name`. Without `default` it is required.

    The field's annotation is one of bool, int, float, str, Path, any of these `| None` (not given is None), or
    `tuple[X, ...]` of int, float, str or Path (the option takes one or more values, and may be repeated; where it is
    `separate`, one value each time). `minimum` and `maximum` are inclusive; a number must always be finite. One field
    of a dataclass may be `positional`. Each line of `env` is a value of a tuple.
    """
    info = OptionInfo(help, unit, tuple(choices), minimum, maximum, metavar, env, positional, separate)
    return dataclasses.field(default=default, metadata={_METADATA_KEY: info})


def parse(
    cls: type[T],
    argv: Sequence[str],
    prog: str,
    description: str,
    environ: Mapping[str, str] | None = None,
    hints: Mapping[str, str] = MappingProxyType({}),
) -> T:
    """An instance of the settings dataclass `cls` from command-line arguments (without the program's name).

    Ends the process: status 0 after --help, status 2 with one line on stderr where an argument is wrong or missing.
    `environ` replaces the process environment. `hints`: options that users of other programs may try, each with a
    sentence for the error. A `SettingsError` out of `cls.__post_init__` ends it in the same way.
    """
    parser = _OneLineParser(prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    annotations = typing.get_type_hints(cls)
    env = os.environ if environ is None else environ
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        _add_argument(parser, field, _Kind.of(field.name, annotations[field.name]), env)
    known, unknown = parser.parse_known_args(list(argv))
    if unknown:
        parser.error(_unknown_message(unknown, hints))
    values = vars(known)
    for name in [name for name in values if name.endswith(_POSITIONAL)]:
        if (value := values.pop(name)) is not None:
            option_name = name.removesuffix(_POSITIONAL)
            if values[option_name] not in (value, parser.get_default(option_name)):
                parser.error(f"two values for {option_name}: {value!r} and {values[option_name]!r}")
            values[option_name] = value
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except SettingsError as error:
        parser.error(str(error))


def _unknown_message(unknown: Sequence[str], hints: Mapping[str, str]) -> str:
    found = [name for name in (argument.partition("=")[0] for argument in unknown) if name in hints]
    said = "; ".join(dict.fromkeys(f"{name}: {hints[name]}" for name in found))
    return f"unrecognized arguments: {' '.join(unknown)}" + (f"; {said}" if said else "")


def is_from_environment(cls: type, name: str, value: str, environ: Mapping[str, str] | None = None) -> bool:
    """Whether the environment, too, gives field `name` of `cls` this value, so that the command line need not have.

    Variables of a convention that many programs share may be set for all processes of a machine.
    """
    info: OptionInfo = next(field for field in dataclasses.fields(cls) if field.name == name).metadata[_METADATA_KEY]
    return bool(info.env) and (os.environ if environ is None else environ).get(info.env) == value


def as_arguments(cls: type, values: Mapping[str, Any]) -> list[str]:
    """The command line that gives these fields of `cls` these values; fields with their default need no argument."""
    arguments: list[str] = []
    for field in dataclasses.fields(cls):
        value = values.get(field.name)
        flag = "--" + field.name.replace("_", "-")
        if value is None or value == field.default:
            continue
        if isinstance(value, bool):
            arguments.append(flag if value else f"--no-{flag[2:]}")
        elif isinstance(field.default, tuple):
            arguments += [f"{flag}={entry}" for entry in (value if isinstance(value, list | tuple) else (value,))]
        else:
            arguments.append(f"{flag}={value}")
    return arguments


def require_loopback(address: str, insecure_network: bool) -> None:
    """Raise SettingsError where a bind to `address` would be reachable from other machines without --insecure-network.

    `address` is a host: "127.0.0.1", "localhost", "::1". A host name other than localhost counts as a network: where it
    points to can change.
    """
    if insecure_network or is_loopback_host(address):
        return
    raise SettingsError(
        f"refusing to bind to {address!r}: other machines could reach it; bind to 127.0.0.1, or pass "
        "--insecure-network to serve them"
    )


def is_loopback_host(address: str) -> bool:
    """Whether only this machine can reach what is bound to this host."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False  # no IP address: a wildcard, an interface or a host name


@dataclass(frozen=True, slots=True)
class _Kind:
    """A field's annotation, taken apart."""

    base: type
    repeated: bool = False
    optional: bool = False

    @classmethod
    def of(cls, name: str, hint: Any) -> _Kind:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin is tuple and len(args) == 2 and args[1] is Ellipsis and args[0] in _METAVARS:
            return cls(args[0], repeated=True)
        if origin in (types.UnionType, typing.Union) and len(args) == 2 and type(None) in args:
            inner = cls.of(name, args[0] if args[1] is type(None) else args[1])
            if not inner.repeated:
                return cls(inner.base, optional=True)
        if hint is bool or hint in _METAVARS:
            return cls(hint)
        raise TypeError(f"setting {name}: no command line can be made from the type {hint}")


def _add_argument(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], kind: _Kind, env: Mapping[str, str]
) -> None:
    """Add the option of one field."""
    info: OptionInfo = field.metadata[_METADATA_KEY]
    flag = "--" + field.name.replace("_", "-")
    default = field.default
    required = default is dataclasses.MISSING and not env.get(info.env)
    help_text = _help_text(info, kind, default).replace("%", "%%")
    if kind.base is bool:
        action = "store_true" if default is False else argparse.BooleanOptionalAction  # the latter adds --no-...
        parser.add_argument(flag, action=action, default=default, required=required, help=help_text)
        return
    convert = _converter(kind.base, info)
    if env.get(info.env):
        try:
            given = [convert(text) for text in (env[info.env].splitlines() if kind.repeated else [env[info.env]])]
        except argparse.ArgumentTypeError as error:
            parser.error(f"environment variable {info.env}: {error}")
        default = tuple(given) if kind.repeated else given[0]
    parser.add_argument(
        flag,
        action=_AppendAnew if kind.repeated else "store",
        nargs="+" if kind.repeated and not info.separate else None,
        type=convert,
        default=default,
        required=required,
        metavar=info.metavar or ("{" + ",".join(info.choices) + "}" if info.choices else _METAVARS[kind.base]),
        help=help_text,
    )
    if info.positional:
        parser.add_argument(
            field.name + _POSITIONAL, nargs="?", type=convert, metavar=info.metavar or None, help=f"the same as {flag}"
        )


def _converter(base: type, info: OptionInfo) -> Callable[[str], Any]:
    """Text of one argument -> checked value."""

    def convert(text: str) -> Any:
        try:
            value = base(text)
        except ValueError:
            wanted = {int: "a whole number", float: "a number"}[base]
            raise argparse.ArgumentTypeError(f"must be {wanted}, not {text!r}") from None
        if info.choices and value not in info.choices:
            raise argparse.ArgumentTypeError(f"must be one of {', '.join(info.choices)}, not {text!r}")
        if base in (int, float):
            _check_number(value, info)
        return value

    return convert


def _check_number(value: float, info: OptionInfo) -> None:
    unit = f" {info.unit}" if info.unit else ""
    if isinstance(value, float) and not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a finite number, not {value}")
    if info.minimum is not None and value < info.minimum:
        raise argparse.ArgumentTypeError(f"must be at least {info.minimum}{unit}, not {value}")
    if info.maximum is not None and value > info.maximum:
        raise argparse.ArgumentTypeError(f"must be at most {info.maximum}{unit}, not {value}")


def _help_text(info: OptionInfo, kind: _Kind, default: Any) -> str:
    """The line of help with unit, default and bounds; the value of an environment variable is never shown."""
    facts = [f"in {info.unit}"] if info.unit else []
    if kind.repeated:
        facts.append("may be repeated" if info.separate else "one or more")
    if default is dataclasses.MISSING:
        facts.append("required")
    elif default not in (None, "", ()):
        facts.append(f"default {_shown(default)}")
    if info.minimum is not None and info.maximum is not None:
        facts.append(f"{info.minimum} to {info.maximum}")
    elif info.minimum is not None:
        facts.append(f"at least {info.minimum}")
    elif info.maximum is not None:
        facts.append(f"at most {info.maximum}")
    if info.env:
        facts.append(f"also read from {info.env}")
    return info.help + (f" ({', '.join(facts)})" if facts else "")


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)


class _AppendAnew(argparse.Action):
    """Collects repeated options; the first one given replaces the default instead of adding to it."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        given = getattr(namespace, self.dest)
        added = values if isinstance(values, list) else [values]
        setattr(namespace, self.dest, [*given, *added] if isinstance(given, list) else added)


class _HelpFormatter(argparse.HelpFormatter):
    """Help in two columns that stay readable with long option names."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class _OneLineParser(argparse.ArgumentParser):
    """Errors are one line: the usage of a node is a screen long and would hide them."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)
