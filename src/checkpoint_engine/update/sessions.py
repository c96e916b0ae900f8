"""A rank's door: where engines' workers say hello and are handed store memory.

One socket for the life of the rank. A connection that begins with `Hold` is a lease of a segment
and may outlive updates; one that begins with `Open` asks for files, and ends when they are handed
over; one that begins with `Hello` is a session of the update under way, and is turned away when
there is none. Every connection has a thread, which ends with it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    ForeignPeer,
    PeerLost,
    ProtocolError,
    RemoteError,
)
from checkpoint_engine.sources.files import TensorFiles
from checkpoint_engine.store import Segment
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.files import Open, serve_files
from checkpoint_engine.transport.handover import Hold, LetGo, serve_lease
from checkpoint_engine.update.protocol import (
    PROTOCOL,
    Applied,
    Confirmed,
    Decision,
    Event,
    FromRank,
    FromSession,
    Hello,
    Joined,
    Left,
    Offer,
    Ready,
    Stop,
    Withdrawn,
)
from checkpoint_engine.update.relay import Action, Relay, Tell

__all__ = ["Door", "Sessions"]

Heard = FromSession | Hold | LetGo | Open

GREETING_SECONDS = 30.0
GRACE_SECONDS = 60.0
ACCEPT_RETRY_SECONDS = 0.1
NO_UPDATE = Stop(reason="no update is under way at this handle")


class Door:
    """Listens at `address` until closed.

    Args:
        segment: finds a segment of this rank's store by name.
        files: finds the files of a version that this rank streams by name.
    """

    def __init__(
        self,
        segment: Callable[[str], Segment | None],
        files: Callable[[str], TensorFiles | None] = lambda name: None,
    ) -> None:
        self._segment, self._files = segment, files
        self._listener, self.address = sockets.listen()
        self._sessions: Sessions | None = None
        self._closed = False
        self._channels: set[Channel[Heard]] = set()
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
        channel: Channel[Heard] = Channel(connection, Heard)
        self._channels.add(channel)
        try:
            sockets.check_peer(connection)
            first = channel.receive(GREETING_SECONDS)
            sessions = self._sessions
            if isinstance(first, Hold):
                serve_lease(channel, first, self._segment)
            elif isinstance(first, Open):
                serve_files(channel, first, self._files)
            elif isinstance(first, Hello) and sessions is not None:
                sessions.serve(channel, first)
            else:
                channel.send(NO_UPDATE)
        except ForeignPeer as error:
            if self._sessions is not None:
                self._sessions.fail(sockets.peer_name(connection), error)
        except CheckpointEngineError:
            return  # a peer that is not trusted, or speaks something else: nothing has begun
        finally:
            channel.close()
            self._channels.discard(channel)


class _Line:
    """The way to one session, which hears what was decided in the order in which it was."""

    def __init__(self, channel: Channel[Heard]) -> None:
        self.channel = channel
        self.untold: queue.SimpleQueue[FromRank] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def tell(self) -> None:
        with self._lock:
            while not self.untold.empty():
                self.channel.send(self.untold.get())


class Sessions:
    """The sessions of one update on one rank: performs what a `Relay` says.

    Args:
        rank: this rank.
        offer: what every session is offered.
        post: passes an event to the coordinator; called from many threads.
    """

    def __init__(self, rank: int, offer: Offer, post: Callable[[Event], None]) -> None:
        self._rank, self._offer, self._post = rank, offer, post
        self._relay = Relay(rank, offer)
        self._lock = threading.Lock()
        self._lines: dict[str, _Line] = {}
        self._foreign: set[str] = set()
        self._closed = False

    def serve(self, channel: Channel[Heard], hello: Hello) -> None:
        """Play the rank's part with one session until it is over. Runs on its thread."""
        channel.bind(self._offer.update, self._offer.epoch)
        deadlines = self._offer.deadlines
        longest = deadlines.ready_seconds + deadlines.pause_seconds + GRACE_SECONDS
        with self._lock:
            if self._closed:  # the door has let it in, and nobody would decide for it
                channel.send(NO_UPDATE)
                return
            name, actions = self._relay.joined(hello)
            self._lines[name] = _Line(channel)
            self._line_up(actions)
        try:
            self._perform(actions)
            while self._is_open(name):
                vote = channel.receive(longest)
                if not isinstance(vote, (Ready, Applied, Confirmed, Withdrawn)):
                    raise ProtocolError(f"a vote was due, not {type(vote).__name__}")
                with self._lock:
                    actions = self._line_up(self._relay.voted(name, vote))
                self._perform(actions)
        except (PeerLost, ProtocolError, DeadlineExceeded) as error:
            with self._lock:
                actions = self._relay.left(name, RemoteError.of(error, hello.replica))
            self._perform(actions)

    def fail(self, name: str, error: Exception) -> None:
        """An engine's worker has come that will never take part, however often it comes again."""
        hello = Hello(protocol=PROTOCOL, replica=name, engine=name, rank=0, world_size=1)
        with self._lock:
            if name in self._foreign:
                return
            self._foreign.add(name)
        session = f"{self._rank}.{name}"
        self._post(Joined(session=session, rank=self._rank, hello=hello))
        self._post(Left(session=session, error=RemoteError.of(error, name)))

    def decide(self, decision: Decision) -> None:
        """Pass "apply", "publish" or "stop" on."""
        with self._lock:
            actions = self._line_up(self._relay.decided(decision))
        self._perform(actions)

    def close(self) -> None:
        """End every session; one that is still in doubt returns to its base."""
        with self._lock:
            self._closed = True
            lines = list(self._lines.values())
        for line in lines:
            line.channel.close()

    def _is_open(self, name: str) -> bool:
        with self._lock:
            return self._relay.is_open(name)

    def _line_up(self, actions: list[Action]) -> list[Action]:
        """Fix, under the lock, the order of what is told: telling it may take time."""
        for action in actions:
            if isinstance(action, Tell):
                self._lines[action.session].untold.put(action.message)
        return actions

    def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Tell):
                # A peer that is gone is noticed by the thread that listens to it.
                with contextlib.suppress(PeerLost, DeadlineExceeded):
                    self._lines[action.session].tell()
            else:
                self._post(action)
