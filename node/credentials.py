"""Who a node is on its links: the secret of a cluster, and the CURVE keys of each role that are derived from it.

All nodes of a cluster read the same secret file. A server is checked by its role's public key, and a client presents
the key of its own role, so each end knows the other's role. This module opens no socket: sockets.py uses the keys, and
authentication.py checks those of clients.

Derivation: BLAKE2b keyed by the secret, of the role's name, is the private key (RFC 7693; X25519 clamps it, RFC 7748).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import zmq
from zmq.utils import z85

from baton.node.errors import SettingsError
from baton.node.secret_file import SECRET_BYTES, read_secret
from baton.node.telemetry import log_event

logger = logging.getLogger("links")

NodeRole = Literal["proxy", "prefill", "decode", "mixed", "store", "stage"]
ROLES: tuple[NodeRole, ...] = get_args(NodeRole)
PAIRED_WITH: Mapping[NodeRole, NodeRole] = {"prefill": "decode", "decode": "prefill", "mixed": "mixed"}
"""The role of the workers that a worker exchanges KV with."""
_PURPOSE = b"baton-link-keys1"


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Of CURVE, in Z85."""

    public: bytes
    private: bytes = field(repr=False)


class Keys:
    """The key pair of each role, of one secret."""

    def __init__(self, secret: bytes) -> None:
        assert len(secret) == SECRET_BYTES, len(secret)
        if not zmq.has("curve"):
            raise SettingsError("this build of libzmq has no CURVE: install pyzmq from its wheel, which has it")
        self._pairs = {role: _derive(secret, role) for role in ROLES}
        self._roles = {z85.decode(pair.public): role for role, pair in self._pairs.items()}

    def pair(self, role: NodeRole) -> KeyPair:
        return self._pairs[role]

    def public(self, role: NodeRole) -> bytes:
        return self._pairs[role].public

    def role_of(self, public_key: bytes) -> NodeRole | None:
        """The role whose public key these 32 bytes are."""
        return self._roles.get(public_key)


@dataclass(frozen=True, slots=True)
class Credentials:
    """The role of this node, and the keys of its links."""

    role: NodeRole
    keys: Keys | None = None
    """None: links are in the clear, and any peer is believed."""


def link_credentials(role: NodeRole, secret_file: Path | None, insecure_network: bool) -> Credentials:
    """Credentials of a node with these settings. Raises SettingsError where they ask for no protection by omission."""
    if secret_file is not None:
        return Credentials(role, Keys(read_secret(secret_file)))
    if not insecure_network:
        raise SettingsError(
            "no --secret-file: make one with `baton secret FILE`, and give it to every node of the cluster; or pass "
            "--insecure-network to run the links between them in the clear, on a network you trust"
        )
    log_event(
        logger,
        "links_insecure",
        level=logging.WARNING,
        opens="any process that reaches a port of this node reads prompts, joins as a worker and changes KV",
        remedy="--secret-file",
    )
    return Credentials(role)


def _derive(secret: bytes, role: NodeRole) -> KeyPair:
    private = z85.encode(hashlib.blake2b(role.encode(), key=secret, person=_PURPOSE, digest_size=32).digest())
    return KeyPair(zmq.curve_public(private), private)
