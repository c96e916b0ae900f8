"""What a rank does between its sessions and the coordinator: pure.

Messages, decisions and broken connections go in; what to post to the coordinator and what to tell
which session comes out. No sockets, no threads, no clock, so that a simulation can play every
schedule of faults against it; `update.sessions` performs what it says.

    relay = Relay(rank, offer)
    name, actions = relay.joined(hello)
    while relay.is_open(name):
        actions = relay.voted(name, vote)
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from checkpoint_engine.errors import ProtocolError, RemoteError
from checkpoint_engine.update.protocol import (
    Applied,
    Confirmed,
    Decision,
    Event,
    FromRank,
    Hello,
    Joined,
    Left,
    Offer,
    Proceed,
    Ready,
    Stop,
    Vote,
    Voted,
    Withdrawn,
)

__all__ = ["Action", "Relay", "Tell"]

VOTES = (Ready, Applied, Confirmed)


@dataclass(frozen=True)
class Tell:
    """Send this to the session, if it is still there."""

    session: str
    message: FromRank


Action = Event | Tell


@dataclass
class _Line:
    """A connection to one session."""

    follower: bool
    num_votes: int = 0
    offered: bool = False
    said_no: bool = False
    told_last: bool = False
    closed: bool = False


class Relay:
    """One update on one rank.

    Args:
        rank: this rank.
        offer: what every session is offered.
    """

    def __init__(self, rank: int, offer: Offer) -> None:
        self._rank, self._offer = rank, offer
        self._lines: dict[str, _Line] = {}
        self._step = "enter"

    def joined(self, hello: Hello) -> tuple[str, list[Action]]:
        """A session has said hello; returns its name, too.

        One that comes after the vote, such as a draft model's, follows what is decided.
        """
        name = f"{self._rank}.{len(self._lines)}"
        follower = self._step != "enter"
        self._lines[name] = _Line(follower)
        event = Joined(session=name, rank=self._rank, hello=hello, follower=follower)
        if not follower:
            self._lines[name].offered = True
            return name, [event, Tell(name, self._offer)]
        return name, [event, *self._lead(name)]

    def voted(self, name: str, vote: Vote) -> list[Action]:
        """A session has voted.

        Raises:
            ProtocolError: another vote was due; the coordinator would wait out this one.
        """
        line = self._lines[name]
        if line.said_no:
            raise ProtocolError(f"{type(vote).__name__} came after a no")
        due = VOTES[line.num_votes]
        if not isinstance(vote, (due, Withdrawn)):
            raise ProtocolError(f"{due.__name__} was due, not {type(vote).__name__}")
        line.num_votes += 1
        actions: list[Action] = [Voted(session=name, vote=vote)]
        line.closed = isinstance(vote, Confirmed)
        line.said_no = isinstance(vote, Withdrawn)
        if line.follower:
            actions += self._answer(name, vote)
        return actions

    def left(self, name: str, error: RemoteError) -> list[Action]:
        """The connection to a session has ended; after a "no" that is no news."""
        line = self._lines[name]
        was_awaited = not line.said_no and not line.closed
        line.closed = True
        return [Left(session=name, error=error)] if was_awaited else []

    def is_open(self, name: str) -> bool:
        """Whether the session is to be listened to.

        Whoever has said no stays on the line until it was told whether it is quarantined.
        """
        line = self._lines[name]
        return not line.closed and not (line.said_no and line.told_last)

    def decided(self, decision: Decision) -> list[Action]:
        """The coordinator has decided "apply", "publish" or "stop"."""
        self._step = decision.step
        actions: list[Action] = []
        for name, line in self._lines.items():
            if line.follower:
                actions += self._lead(name)
            elif not line.told_last:
                actions.append(self._verdict(name, decision))
        return actions

    def _verdict(self, name: str, decision: Decision) -> Tell:
        if name in decision.proceed:
            return Tell(name, Proceed(step=decision.step))
        self._lines[name].told_last = True
        if name in decision.quarantine:
            return Tell(name, Stop(reason="another worker of its engine failed", quarantine=True))
        return Tell(name, Stop(reason=decision.reason or "it said hello after the vote"))

    def _lead(self, name: str) -> list[Action]:
        """Offer a follower what was published, or nothing."""
        line = self._lines[name]
        if self._step == "stop" and not line.told_last:
            line.told_last = line.closed = True
            return [Tell(name, Stop(reason="the update was not published"))]
        if self._step == "publish" and not line.offered:
            line.offered = True
            return [Tell(name, msgspec.structs.replace(self._offer, follower=True))]
        return []

    def _answer(self, name: str, vote: Vote) -> list[Action]:
        """A follower waits for nobody."""
        if isinstance(vote, Withdrawn):
            self._lines[name].told_last = True
            return [Tell(name, Stop(reason="a follower failed"))]
        steps = {Ready: "apply", Applied: "publish"}
        return [Tell(name, Proceed(step=steps[type(vote)]))] if type(vote) in steps else []
