"""A rank's door: where engines' workers say hello and are handed store memory.

One socket for the life of the rank. A connection that begins with `Hold` is a lease of a segment
and may outlive updates; one that begins with `Hello` is a session of the update under way, and is
turned away when there is none. Every connection has a thread, which ends with it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    RemoteError,
)
from checkpoint_engine.store import Segment
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.handover import Hold, LetGo, serve_lease
from checkpoint_engine.update.protocol import (
    Applied,
    Confirmed,
    Decision,
    Event,
    FromSession,
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

__all__ = ["Door", "Sessions"]

GREETING_SECONDS = 30.0
GRACE_SECONDS = 60.0
ACCEPT_RETRY_SECONDS = 0.1


class Door:
    """Listens at `address` until closed.

    Args:
        segment: finds a segment of this rank's store by name.
    """

    def __init__(self, segment: Callable[[str], Segment | None]) -> None:
        self._segment = segment
        self._listener, self.address = sockets.listen()
        self._sessions: Sessions | None = None
        self._closed = False
        self._channels: set[Channel[FromSession | Hold | LetGo]] = set()
        threading.Thread(target=self._accept, name="ckpt-door", daemon=True).start()

    def attend(self, sessions: Sessions | None) -> None:
        """Send those who say hello to this update; None when it is over."""
        self._sessions = sessions

    def close(self) -> None:
        """Stop listening, and end every session and lease."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.address.removeprefix(sockets.SCHEME))
        for channel in tuple(self._channels):
            channel.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(ACCEPT_RETRY_SECONDS)  # out of descriptors, say: others wait in line
                continue
            threading.Thread(
                target=self._serve, args=(connection,), name="ckpt-session", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        channel: Channel[FromSession | Hold | LetGo] = Channel(
            connection, FromSession | Hold | LetGo
        )
        self._channels.add(channel)
        try:
            sockets.check_peer(connection)
            first = channel.receive(GREETING_SECONDS)
            if isinstance(first, Hold):
                serve_lease(channel, first, self._segment)
            elif isinstance(first, Hello) and self._sessions is not None:
                self._sessions.serve(channel, first)
            else:
                channel.send(Stop(reason="no update is under way at this handle"))
        except CheckpointEngineError:
            return  # a peer that is not trusted, or speaks something else: nothing has begun
        finally:
            channel.close()
            self._channels.discard(channel)


@dataclass
class _Session:
    channel: Channel[FromSession | Hold | LetGo]
    follower: bool
    dismissed: bool = False


class Sessions:
    """The sessions of one update on one rank: votes go up as events, decisions down.

    Args:
        rank: this rank.
        offer: what every session is offered.
        post: passes an event to the coordinator; called from many threads.
    """

    def __init__(self, rank: int, offer: Offer, post: Callable[[Event], None]) -> None:
        self._rank, self._offer, self._post = rank, offer, post
        self._lock = threading.Lock()
        self._sessions: dict[str, _Session] = {}
        self._step = "enter"
        self._decided = threading.Event()

    def serve(self, channel: Channel[FromSession | Hold | LetGo], hello: Hello) -> None:
        """Play the rank's part with one session until it is over. Runs on its thread."""
        channel.bind(self._offer.update, self._offer.epoch)
        with self._lock:
            follower = self._step != "enter"
            name = f"{self._rank}.{len(self._sessions)}"
            self._sessions[name] = _Session(channel, follower)
        self._post(Joined(session=name, rank=self._rank, hello=hello, follower=follower))
        try:
            if follower:
                self._lead_follower(name, channel)
            else:
                self._send(name, self._offer)
                self._listen(name, channel)
        except (PeerLost, ProtocolError, DeadlineExceeded) as error:
            self._post(Left(session=name, error=RemoteError.of(error, hello.replica)))

    def decide(self, decision: Decision) -> None:
        """Pass "apply", "publish" or "stop" on to every session that votes."""
        with self._lock:
            self._step = decision.step
            voters = [name for name, session in self._sessions.items() if not session.follower]
        for name in voters:
            if name in decision.proceed:
                self._send(name, Proceed(step=decision.step))
            elif name in decision.quarantine:
                reason = "another worker of its engine failed"
                self._send(name, Stop(reason=reason, quarantine=True), last=True)
            else:
                reason = decision.reason or "it said hello after the vote"
                self._send(name, Stop(reason=reason), last=True)
        if decision.step in ("publish", "stop"):
            self._decided.set()

    def close(self) -> None:
        """End every session; one that is still in doubt returns to its base."""
        with self._lock:
            sessions = list(self._sessions.values())
        for session in sessions:
            session.channel.close()

    def _listen(self, name: str, channel: Channel[FromSession | Hold | LetGo]) -> None:
        deadlines = self._offer.deadlines
        longest = deadlines.ready_seconds + deadlines.pause_seconds + GRACE_SECONDS
        for due in (Ready, Applied, Confirmed):
            if isinstance(self._receive_vote(name, channel, due, longest), Withdrawn):
                self._hold_the_line(name, channel, longest)
                return

    def _receive_vote(
        self,
        name: str,
        channel: Channel[FromSession | Hold | LetGo],
        due: type[Ready | Applied | Confirmed],
        timeout_seconds: float,
    ) -> Vote:
        """Pass on the vote that is due, or a "no"; the coordinator would wait out any other."""
        vote = channel.receive(timeout_seconds)
        if not isinstance(vote, (due, Withdrawn)):
            raise ProtocolError(f"{due.__name__} was due, not {type(vote).__name__}")
        self._post(Voted(session=name, vote=vote))
        return vote

    def _hold_the_line(
        self, name: str, channel: Channel[FromSession | Hold | LetGo], timeout_seconds: float
    ) -> None:
        """Whoever said no waits to hear whether it is quarantined, and then hangs up."""
        with self._lock:
            told = self._sessions[name].dismissed
        if not told:
            with contextlib.suppress(PeerLost):
                channel.receive(timeout_seconds)

    def _send(self, name: str, message: Offer | Proceed | Stop, *, last: bool = False) -> None:
        """A peer that is gone is reported by the thread that listens to it."""
        session = self._sessions[name]
        if session.dismissed:
            return
        session.dismissed = last
        with contextlib.suppress(PeerLost, DeadlineExceeded):
            session.channel.send(message)

    def _lead_follower(self, name: str, channel: Channel[FromSession | Hold | LetGo]) -> None:
        """A session that came after the vote, such as a draft model's, follows what was decided."""
        seconds = self._offer.deadlines.ready_seconds
        if not self._decided.wait(seconds) or self._step == "stop":
            self._send(name, Stop(reason="the update was not published"))
            return
        self._send(name, msgspec.structs.replace(self._offer, follower=True))
        for due, step in ((Ready, "apply"), (Applied, "publish"), (Confirmed, "")):
            if isinstance(self._receive_vote(name, channel, due, seconds), Withdrawn):
                self._send(name, Stop(reason="a follower failed"))
                return
            if step:
                self._send(name, Proceed(step=step))
