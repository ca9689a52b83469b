"""The choice of a data plane for a pair of workers: the first of our own, by preference, that reaches the peer."""

from __future__ import annotations

from collections.abc import Sequence

from baton.kvtransfer.planes.base import Plane
from baton.node.messages.transfer import PlaneAddress


def choose(own: Sequence[Plane], peer: Sequence[PlaneAddress]) -> Plane | None:
    """The plane to use with a peer that described its ends as `peer`, or None if none fits."""
    for plane in own:
        for address in peer:
            if address.plane == plane.name and plane.reaches(address):
                return plane
    return None
