"""node.addresses: what is bound may differ from what peers connect to, in both families."""

from __future__ import annotations

import pytest

from baton.node.addresses import ListenHost, host_of, is_address, is_ipv6, is_name, listen_host, with_brackets
from baton.node.errors import SettingsError


@pytest.mark.parametrize(
    ("bind", "advertise", "bound", "address"),
    [
        ("tcp://127.0.0.1:0", "", "tcp://127.0.0.1:*", "tcp://127.0.0.1:7"),
        ("tcp://0.0.0.0:0", "10.1.2.3", "tcp://0.0.0.0:*", "tcp://10.1.2.3:7"),
        ("tcp://*:0", "decode-0.decode", "tcp://*:*", "tcp://decode-0.decode:7"),
        ("tcp://[fd00::5]:0", "", "tcp://[fd00::5]:*", "tcp://[fd00::5]:7"),
        ("tcp://fd00::5:0", "", "tcp://[fd00::5]:*", "tcp://[fd00::5]:7"),
        ("tcp://[::]:0", "fd00::6", "tcp://[::]:*", "tcp://[fd00::6]:7"),
        ("tcp://10.0.0.2:0", "[fd00::6]", "tcp://10.0.0.2:*", "tcp://[fd00::6]:7"),
    ],
)
def test_peers_connect_to_the_advertised_host(bind: str, advertise: str, bound: str, address: str) -> None:
    """Guards against workers that register as 0.0.0.0, or with the address that a container has inside only."""
    host = listen_host(bind, advertise)
    assert host.any_port() == bound
    found = host.advertise(with_brackets(bind).removesuffix("0") + "7")
    assert found == address and is_address(found)


def test_an_interface_is_advertised_by_its_address() -> None:
    """Guards `--bind tcp://eth0:0`: peers do not know the names of this host's interfaces."""
    host = listen_host("tcp://eth0:0")
    assert host.any_port() == "tcp://eth0:*"
    assert host.advertise("tcp://10.0.0.2:7") == "tcp://10.0.0.2:7"


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://[::]:0", "tcp://:::0", "tcp://:0"])
def test_all_addresses_need_a_host_to_advertise(bind: str) -> None:
    """Guards against a worker that starts, registers an address that means every host, and hands over no KV."""
    with pytest.raises(SettingsError, match="--advertise-host"):
        listen_host(bind)
    assert listen_host(bind, "10.0.0.2").advertised == "10.0.0.2"


@pytest.mark.parametrize("advertise", ["a b", "tcp://10.0.0.2", "10.0.0.2/24", "x" * 254, "0.0.0.0", "::"])
def test_what_is_no_host_is_not_advertised(advertise: str) -> None:
    """Guards against an address that peers refuse one by one, instead of an error here."""
    with pytest.raises(SettingsError):
        listen_host("tcp://127.0.0.1:0", advertise)


def test_names_are_told_from_addresses() -> None:
    """Guards the family in which a name is looked up."""
    assert is_name("tcp://baton-proxy-0.baton-proxy:5570") and is_name("tcp://node1:5570")
    assert not is_name("tcp://10.0.0.1:5570") and not is_name("tcp://[fd00::a]:5570")
    assert is_ipv6("tcp://[fd00::a]:5570") and not is_ipv6("tcp://fd00:5570")
    assert host_of("tcp://*:5570") == "" and host_of("tcp://[::1]:0") == "::1"


def test_an_advertised_host_that_is_bound_keeps_the_bound_address() -> None:
    """Guards against a text that is made anew, and differs from what libzmq says."""
    assert ListenHost("localhost", "localhost").advertise("tcp://127.0.0.1:7") == "tcp://127.0.0.1:7"
