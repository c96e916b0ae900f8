"""A ZeroMQ socket at one address of this host, answered by a thread of its own until it is closed.

What is asked and answered is its user's; here are the port, the thread and their end. Whatever a
responder calls runs on that thread, so no request needs a lock against another.

    responder = Responder(name="ckpt-peer", max_request_bytes=4096, private_key=private)
    responder.start("10.0.0.1", answer)          # answer(peer, frames) calls responder.send
    ...
    responder.close()
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence

import zmq

from checkpoint_engine.errors import DeadlineExceeded, UsageError
from checkpoint_engine.transport.line import Context, notice_lost_hosts

__all__ = ["Responder"]

CLOSE_SECONDS = 30.0  # for the request that is being answered


def _nothing() -> None:
    """What is done by default."""


class Responder:
    """One ROUTER socket. Whatever is to be set on it, or in its context, is set before the start.

    Args:
        name: of the thread.
        max_request_bytes: whoever sends more is hung up on.
        private_key: of a CURVE server, to encrypt; None to speak in the clear.

    Attributes:
        address: host and port, once it has started.
    """

    def __init__(
        self, *, name: str, max_request_bytes: int, private_key: bytes | None = None
    ) -> None:
        self.context = Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_request_bytes)
        notice_lost_hosts(self.socket)
        if private_key is not None:
            self.socket.curve_server = True
            self.socket.curve_secretkey = private_key
        self.address = ""
        self._closing = self.context.socket(zmq.PAIR)
        self._closing.bind("inproc://close")
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def start(
        self,
        host: str,
        on_request: Callable[[bytes, Sequence[bytes]], None],
        *,
        port: int = 0,
        on_turn: Callable[[], None] = _nothing,
        milliseconds: Callable[[], int | None] = lambda: None,
        on_end: Callable[[], None] = _nothing,
        gate: tuple[zmq.Socket[bytes], Callable[[Sequence[bytes]], None]] | None = None,
    ) -> None:
        """Listen, and answer from now on.

        Args:
            host: address of this host, as peers reach it.
            on_request: called with the peer and the frames that it sent.
            port: 0 for any that is free.
            on_turn: called after whatever woke the thread.
            milliseconds: how long it may sleep; None for ever.
            on_end: called last, on the thread.
            gate: another socket, and what is called with the frames that arrive there.

        Raises:
            UsageError: it cannot listen there.
        """
        try:
            self.socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError as error:
            self.context.destroy(linger=0)
            raise UsageError(
                f"cannot listen on {host}:{port or 'any port'}: {error}; set CKPT_ENGINE_ADDRESS "
                "to an address of this host, and check MASTER_ADDR and MASTER_PORT, after which "
                "two more ports are used"
            ) from error
        endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.address = f"{host}:{endpoint.rpartition(':')[2]}"
        self._on_request, self._on_turn, self._on_end = on_request, on_turn, on_end
        self._milliseconds, self._gate = milliseconds, gate
        self._thread.start()

    def send(self, peer: bytes, *frames: bytes | memoryview) -> None:
        """Answer a peer; called by the thread alone. Large frames are sent as they lie.

        Whoever asked and is gone wants no answer.
        """
        with contextlib.suppress(zmq.ZMQError):
            self.socket.send_multipart([peer, *frames], copy=False)

    def close(self) -> None:
        """Stop listening, once the request that is being answered is done.

        Raises:
            DeadlineExceeded: it is never done; the thread still runs.
        """
        if self._thread.is_alive():
            self._closing.send(b"")
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                raise DeadlineExceeded(f"{self._thread.name} answers a request without end")
        self.context.destroy(linger=0)

    def _serve(self) -> None:
        closing = self.context.socket(zmq.PAIR)
        closing.connect("inproc://close")
        handlers: dict[zmq.Socket[bytes], Callable[[Sequence[bytes]], None]] = {
            self.socket: lambda frames: self._on_request(frames[0], frames[1:])
        }
        if self._gate is not None:
            handlers[self._gate[0]] = self._gate[1]
        poller = zmq.Poller()
        for socket in (closing, *handlers):
            poller.register(socket, zmq.POLLIN)
        while closing not in (ready := dict(poller.poll(self._milliseconds()))):
            for socket, handle in handlers.items():
                if socket in ready:
                    handle(socket.recv_multipart())
            self._on_turn()
        self._on_end()
        for socket in (closing, *handlers):
            socket.close()
