"""python -m baton.testing.relayed_process PORT NAME MODULE ...: `python -m MODULE ...`, which dials through relays.

Before it dials an address of this machine it asks the relay board at PORT for the relay to dial instead. NAME is how
the board knows this process. Otherwise it is the same as the module.
"""

from __future__ import annotations

import json
import re
import runpy
import socket
import sys
from typing import Any

from baton.kvtransfer.planes import zeromq
from baton.node import sockets

ASK_TIMEOUT_S = 10.0
_LOOPBACK = re.compile(r"(tcp://127\.0\.0\.1:)(\d+)", re.ASCII)


def ask_for_relay(board: int, dialer: str, port: int, *, data: bool) -> int:
    """The port to dial instead."""
    with socket.create_connection(("127.0.0.1", board), ASK_TIMEOUT_S) as connection:
        question = {"dialer": dialer, "port": port, "data": data}
        connection.sendall(json.dumps(question).encode() + b"\n")
        return int(connection.makefile().readline())


def dial_through(board: int, dialer: str) -> None:
    """From now on this process dials through relays."""
    direct = sockets.open_dealer

    def open_dealer(context: sockets.Context, address: str, options: sockets.Options, **more: Any) -> sockets.Socket:
        if (match := _LOOPBACK.fullmatch(address)) is not None:
            port = ask_for_relay(board, dialer, int(match[2]), data=options is zeromq.SENDING)
            address = f"{match[1]}{port}"
        return direct(context, address, options, **more)

    sockets.open_dealer = open_dealer


if __name__ == "__main__":
    board, dialer, module, *arguments = sys.argv[1:]
    dial_through(int(board), dialer)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
