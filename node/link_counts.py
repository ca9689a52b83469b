"""Counts of the messages of one link, by which both ends notice that some were lost.

ZeroMQ keeps the order of messages, and loses some when a connection breaks or a frame cannot be read. A request of
which one was lost (its dispatch, its last token) would wait for its deadline. So each end says from time to time how
many messages it has sent before, and the other compares that with how many have come since the link was joined.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LinkCounts:
    """One end's counts. Every message of the link is counted, those that carry a count too, after it was compared."""

    sent: int = 0
    received: int = 0
    _ahead: int = 0
    """How many more the peer has sent than came: what it was when the link was joined."""

    def join(self, peer_sent: int) -> None:
        """The peer counted so many when it joined: losses count from here."""
        self._ahead = peer_sent - self.received

    def lost(self, peer_sent: int) -> int:
        """How many messages were lost since the last call, where the peer has sent `peer_sent`.

        Repeated messages are harmless; they only make the count begin anew.
        """
        ahead = peer_sent - self.received
        lost, self._ahead = ahead - self._ahead, ahead
        return max(0, lost)
