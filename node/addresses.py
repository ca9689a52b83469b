"""Addresses as text: what a node binds, and what it lets its peers connect to. Opens no socket, looks up no name."""

from __future__ import annotations

import re
from dataclasses import dataclass

from baton.node.errors import SettingsError

ADVERTISE_HELP = (
    "host name or IP address that other workers reach this one by, where it is not the host of --bind: in front of a "
    "container's network, or for --bind tcp://0.0.0.0:0"
)
ALL = ("", "*", "0.0.0.0", "::")

_ADDRESS = re.compile(r"tcp://(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,64}\]):([1-9][0-9]{0,4})", re.ASCII)
_HOST = re.compile(r"[A-Za-z0-9._-]{1,253}|[0-9A-Fa-f:.]{2,64}", re.ASCII)
_LOOPBACK = re.compile(r"tcp://(?:127\.|localhost:|\[::1\])")


@dataclass(frozen=True, slots=True)
class ListenHost:
    """The host that a worker's sockets listen at, and the one that its peers connect to; neither has brackets.

    Raises SettingsError for one that no peer can connect to.
    """

    bound: str
    """An IP address, an interface, a name; one of ALL for all addresses."""
    advertised: str

    def __post_init__(self) -> None:
        if self.advertised in ALL:
            raise SettingsError(
                f"peers cannot connect to {self.advertised or '*'}: give --bind the address of one interface, or name "
                "this host with --advertise-host"
            )
        if not _HOST.fullmatch(self.advertised):
            raise SettingsError(f"--advertise-host: {self.advertised[:80]!r} is no host name and no IP address")

    def any_port(self) -> str:
        """The address that binds a free port."""
        return f"tcp://{in_address(self.bound or '*')}:*"

    def advertise(self, bound_address: str) -> str:
        """The address by which peers reach what is bound at this one, with a number as its port."""
        if self.advertised == self.bound:
            return bound_address
        return f"tcp://{in_address(self.advertised)}:{bound_address.rpartition(':')[2]}"


LOOPBACK = ListenHost("127.0.0.1", "127.0.0.1")


def listen_host(bind: str, advertise: str = "") -> ListenHost:
    """Of the options --bind and --advertise-host. Raises SettingsError for a host that no peer can connect to."""
    bound = host_of(bind)
    return ListenHost(bound, advertise.removeprefix("[").removesuffix("]") or bound)


def host_of(address: str) -> str:
    """The host of an address, an IPv6 one without brackets; "" for all: "tcp://[::1]:0" is of "::1"."""
    host = address.removeprefix("tcp://").rpartition(":")[0].removeprefix("[").removesuffix("]")
    return "" if host == "*" else host


def with_brackets(address: str) -> str:
    """`address` with brackets around an IPv6 host: Kubernetes writes the address of a pod without them."""
    scheme, separator, rest = address.partition("://")
    host, _, port = rest.rpartition(":")
    return f"{scheme}{separator}[{host}]:{port}" if ":" in host and not host.startswith("[") else address


def is_name(address: str) -> bool:
    """Whether this is an address over TCP whose host is a name (or an interface), and no IP address."""
    host = host_of(address)
    return address.startswith("tcp://") and ":" not in host and bool(re.search("[A-Za-z]", host))


def is_ipv6(address: str) -> bool:
    return ":" in host_of(address)


def is_address(text: str) -> bool:
    """Whether a peer's text is an address over TCP that may be connected to."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and int(match.group(1)) <= 65_535


def is_loopback(text: str) -> bool:
    """Whether an address makes sense on its own host only."""
    return _LOOPBACK.match(text) is not None


def in_address(host: str) -> str:
    """A host as it stands in an address."""
    return f"[{host}]" if ":" in host else host
