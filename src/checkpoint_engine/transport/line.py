"""A ZeroMQ connection to one peer that says at once when the peer is gone.

ZeroMQ connects again and again in silence, which hides that a process has died. A monitor of the
socket tells; whoever holds the line decides what then.

    line = Line(context, zmq.DEALER, "10.0.0.1:4711")
    line.socket.send(request)
    answer = line.receive(timeout_seconds=10)           # or PeerLost, or DeadlineExceeded
"""

from __future__ import annotations

import time

import zmq
from zmq.utils.monitor import parse_monitor_message

from checkpoint_engine.errors import DeadlineExceeded, HandoverError, PeerLost

__all__ = ["Context", "Line", "notice_lost_hosts"]

IDLE_SECONDS, PROBE_SECONDS, NUM_PROBES = 3, 2, 3

GONE = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CONNECT_RETRIED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)


def notice_lost_hosts(socket: zmq.Socket[bytes]) -> None:
    """Let the kernel break connections to a host that is down, or that no link leads to.

    The kernel's probes are answered while a peer's process hangs or is busy, and do not wait in a
    queue behind a large message, as ZeroMQ's heartbeats would.
    """
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, IDLE_SECONDS)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, PROBE_SECONDS)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, NUM_PROBES)
    socket.setsockopt(zmq.TCP_MAXRT, 1000 * (IDLE_SECONDS + PROBE_SECONDS * NUM_PROBES))


class Context(zmq.Context[zmq.Socket[bytes]]):
    """ZeroMQ's, that can be collected at once with its sockets: it waits until they are closed.

    pyzmq closes those that it knows, by weak references, which the collector clears before.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sockets = set()  # type: ignore[assignment]


class Line:
    """One connection, used by one thread at a time. Owns its socket, not the context.

    Args:
        context: whose socket it becomes.
        address: host and port of the peer.
        max_message_bytes: a peer that sends more is hung up on.
        server_key: the peer's public CURVE key; None for a connection in the clear.
        own_keys: public and private, for a peer that knows whom it lets in; default fresh ones.
        peer: what it is, for messages.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        *,
        max_message_bytes: int,
        server_key: bytes | None = None,
        own_keys: tuple[bytes, bytes] | None = None,
        peer: str = "the source",
    ) -> None:
        self.address, self._peer = address, f"{peer} at {address}"
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
        notice_lost_hosts(self.socket)
        self._monitor = self.socket.get_monitor_socket(GONE)
        self._poller = zmq.Poller()
        self._poller.register(self.socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        try:
            if server_key is not None:
                public, private = own_keys or zmq.curve_keypair()
                self.socket.curve_publickey, self.socket.curve_secretkey = public, private
                self.socket.curve_serverkey = server_key
            self.socket.connect(f"tcp://{address}")
        except (zmq.ZMQError, ValueError) as error:
            self.close()
            raise HandoverError(f"{address!r} is no address: {error}") from error

    def receive(self, timeout_seconds: float) -> bytes:
        """The next frame; of a message with several, `socket` has the others at once.

        Raises:
            PeerLost: the peer is gone, or hung up.
            DeadlineExceeded: it is there, or seems to be, and says nothing.
        """
        deadline = time.monotonic() + timeout_seconds
        while True:
            left_seconds = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(int(1000 * left_seconds)))
            if self.socket in ready:
                return self.socket.recv(zmq.NOBLOCK)
            if self._monitor in ready:
                parse_monitor_message(self._monitor.recv_multipart())
                raise PeerLost(f"{self._peer} is gone, or has hung up")
            if not left_seconds:
                raise DeadlineExceeded(f"{self._peer} said nothing for {timeout_seconds:.0f} s")

    def is_broken(self) -> bool:
        """Whether the peer is known to be gone; ZeroMQ may have connected to another since."""
        return bool(self._monitor.poll(0))

    def close(self) -> None:
        """Disconnect."""
        self.socket.disable_monitor()
        self._monitor.close()
        self.socket.close()
