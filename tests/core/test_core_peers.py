"""Memory leased to peers, and read by them; the source is this process, the reader too."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import zmq

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    HandoverError,
    PeerLost,
    TransferError,
    UsageError,
)
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.transport import peers
from checkpoint_engine.transport.peer import Range, Way
from checkpoint_engine.transport.peers import Peer, PeerClient, PeerServer
from checkpoint_engine.transport.zeromq import ZeroMqExporter, ZeroMqReader
from children import wait_until

MIB = 1 << 20
SOON = 0.5


@pytest.fixture
def store() -> Iterator[Store]:
    with closing(Store()) as store:
        yield store


@pytest.fixture
def segment(store: Store) -> Segment:
    """5 MiB and a bit of random bytes; the fixture's own lease ends with the store."""
    segment = store.allocate(5 * MIB + 12345, pooled=False)
    segment.memory[:] = secrets.token_bytes(segment.capacity_bytes)
    return segment


@pytest.fixture
def server(store: Store) -> Iterator[PeerServer]:
    with closing(PeerServer("127.0.0.1", store.segment, lambda topic: topic.encode())) as server:
        yield server


def read(store: Store, way: Way, ranges: list[Range], timeout_seconds: float = 10.0) -> bytes:
    """What was read, each range at its place."""
    end = max(one.place + one.length for one in ranges)
    into = store.allocate(end, pooled=False)
    try:
        with closing(ZeroMqReader(into)) as reader:
            assert sorted(reader.read(way, ranges, timeout_seconds), key=id) == sorted(
                ranges, key=id
            )
        return bytes(into.memory[:end])
    finally:
        into.release()


# Leases


def test_a_lease_keeps_the_bytes_until_it_is_returned(
    store: Store, server: PeerServer, segment: Segment
) -> None:
    with PeerClient(server.peer) as client:
        assert client.describe("whole") == b"whole"
        client.lease(segment.name)
        segment.release()
        assert segment.num_leases == 1
        assert store.segment(segment.name) is segment, "unregistered, but leased"
    wait_until(lambda: store.segment(segment.name) is None, "the end of the lease")


def test_a_lease_whose_holder_says_nothing_ends(
    store: Store, server: PeerServer, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LEASE_SECONDS", 0.2)
    monkeypatch.setattr(peers, "RENEW_SECONDS", 60)
    with PeerClient(server.peer) as client:
        leased = client.lease(segment.name)
        wait_until(lambda: bool(client.describe()) or segment.num_leases == 1, "the end")
        with pytest.raises(PeerLost, match="ended the lease"):
            read(store, leased.ways[0], [Range(0, 0, 100)])


def test_a_lease_is_renewed_as_long_as_its_holder_lives(
    server: PeerServer, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(peers, "RENEW_SECONDS", 0.05)
    with PeerClient(server.peer) as client:
        client.lease(segment.name)
        ends = time.monotonic() + 1.0
        while time.monotonic() < ends:
            assert segment.num_leases == 2
            time.sleep(0.01)


def test_what_is_not_there_is_not_leased(server: PeerServer) -> None:
    with (
        PeerClient(server.peer) as client,
        pytest.raises(HandoverError, match="its version was unregistered"),
    ):
        client.lease("deadbeef")


# Who is answered


def test_who_does_not_know_the_ticket_is_not_answered(server: PeerServer, segment: Segment) -> None:
    stranger = msgspec.structs.replace(server.peer, ticket="0" * 64)
    with PeerClient(stranger, SOON) as client:
        with pytest.raises(DeadlineExceeded):
            client.describe()
        with pytest.raises(DeadlineExceeded):
            client.lease(segment.name)
    assert segment.num_leases == 1


def test_a_server_with_another_key_is_not_asked(server: PeerServer) -> None:
    key = zmq.curve_keypair()[0].decode()
    imposter = msgspec.structs.replace(server.peer, key=key)
    with (
        PeerClient(imposter, SOON) as client,
        pytest.raises((PeerLost, DeadlineExceeded)),
    ):
        client.describe()


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:99999", "", "300.1.1.1:5"])
def test_what_is_no_address_is_refused(server: PeerServer, address: str) -> None:
    nowhere = msgspec.structs.replace(server.peer, address=address)
    with (
        pytest.raises((HandoverError, PeerLost, DeadlineExceeded)),
        PeerClient(nowhere, SOON) as client,
    ):
        client.describe()


def test_nonsense_and_plain_text_change_nothing(server: PeerServer, segment: Segment) -> None:
    context = zmq.Context()
    plain, encrypted = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    encrypted.curve_publickey, encrypted.curve_secretkey = zmq.curve_keypair()
    encrypted.curve_serverkey = server.peer.key.encode()
    for socket in (plain, encrypted):
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(f"tcp://{server.peer.address}")
        for frames in ([b""], [b"\xff" * 100], [b"{}", b"{}"], [b"x" * 100_000], [b"\x80"]):
            socket.send_multipart(frames)
    with PeerClient(server.peer) as client:
        assert client.describe("still here") == b"still here"
    assert not plain.poll(100)
    assert not encrypted.poll(100)
    assert segment.num_leases == 1
    context.destroy(linger=0)


def test_it_listens_at_one_address(server: PeerServer, segment: Segment) -> None:
    with PeerClient(server.peer) as client:
        ways = client.lease(segment.name).ways
        ports = {int(a.rpartition(":")[2]) for a in [server.peer.address, ways[-1].address]}
        lines = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
        listening = {int(line[1][-4:], 16): line[1][:8] for line in lines if line[3] == "0A"}
        assert {listening[port] for port in ports} == {"0100007F"}


def test_an_address_that_is_not_here_is_refused(store: Store) -> None:
    with pytest.raises(UsageError, match="CKPT_ENGINE_ADDRESS"):
        PeerServer("192.0.2.1", store.segment, lambda topic: b"")


# Reads over ZeroMQ


@pytest.mark.parametrize(
    "ranges",
    [
        [Range(0, 0, 1)],
        [Range(5 * MIB + 12344, 7, 1)],
        [Range(0, 0, 5 * MIB + 12345)],
        [Range(n * 999, n * 1000, 999) for n in range(2000)],
        [Range(MIB - 1, 3 * MIB, 2), Range(1, 0, 3 * MIB)],
    ],
    ids=["one byte", "the last byte", "all", "many", "out of order"],
)
def test_ranges_arrive_as_they_are(store: Store, segment: Segment, ranges: list[Range]) -> None:
    with closing(ZeroMqExporter("127.0.0.1")) as exporter:
        found = read(store, exporter.export(segment), ranges)
    for one in ranges:
        there = segment.memory[one.start : one.start + one.length]
        assert found[one.place : one.place + one.length] == there


@pytest.mark.parametrize(("start", "length"), [(5 * MIB + 16384, 1), (-1, 1), (1 << 62, 1)])
def test_what_is_outside_is_not_read(
    store: Store, segment: Segment, start: int, length: int
) -> None:
    into = store.allocate(MIB, pooled=False)
    with (
        closing(ZeroMqExporter("127.0.0.1")) as exporter,
        closing(ZeroMqReader(into)) as reader,
        pytest.raises(PeerLost, match="ended the lease"),
    ):
        list(reader.read(exporter.export(segment), [Range(start, 0, length)], SOON))


def test_a_way_that_was_withdrawn_leads_nowhere(store: Store, segment: Segment) -> None:
    with closing(ZeroMqExporter("127.0.0.1")) as exporter:
        way, other = exporter.export(segment), exporter.export(segment)
        exporter.withdraw(way)
        assert read(store, other, [Range(0, 0, 10)]) == segment.memory[:10]
        with pytest.raises(PeerLost, match="ended the lease"):
            read(store, way, [Range(0, 0, 10)])
        forged = msgspec.structs.replace(other, detail=bytes(16))
        with pytest.raises(PeerLost, match="ended the lease"):
            read(store, forged, [Range(0, 0, 10)])


SOURCE = """
import sys
import msgspec
from checkpoint_engine.store import Store
from checkpoint_engine.transport.zeromq import ZeroMqExporter
store = Store()
segment = store.allocate(64 << 20, pooled=False)
exporter = ZeroMqExporter("127.0.0.1")
print(msgspec.json.encode(exporter.export(segment)).decode(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def source() -> Iterator[tuple[subprocess.Popen[str], Way]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SOURCE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    way = msgspec.json.decode(process.stdout.readline(), type=Way)
    yield process, way
    process.send_signal(signal.SIGCONT)
    process.kill()
    process.communicate()


def test_a_source_that_dies_is_noticed_at_once(
    store: Store, source: tuple[subprocess.Popen[str], Way]
) -> None:
    process, way = source
    into = store.allocate(64 << 20, pooled=False)
    with closing(ZeroMqReader(into)) as reader:
        arriving = reader.read(way, [Range(n * MIB, n * MIB, MIB) for n in range(64)], 600.0)
        next(arriving)
        process.kill()
        with pytest.raises(PeerLost, match="is gone"):
            list(arriving)
        with pytest.raises(PeerLost, match="is gone"):
            list(reader.read(way, [Range(0, 0, 1)], 600.0))


def test_a_source_that_stands_still_is_given_up(
    store: Store, source: tuple[subprocess.Popen[str], Way]
) -> None:
    process, way = source
    into = store.allocate(64 << 20, pooled=False)
    with closing(ZeroMqReader(into)) as reader:
        arriving = reader.read(way, [Range(n * MIB, n * MIB, MIB) for n in range(64)], SOON)
        next(arriving)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(DeadlineExceeded, match="said nothing"):
            list(arriving)


@pytest.mark.parametrize("frames", [[b"nonsense"], [b"echo", b"short"], [b"echo", b"1", b"2"]])
def test_a_source_that_lies_is_given_up(store: Store, frames: list[bytes]) -> None:
    """Its frames are not an answer: not to what was asked, too short, or too many."""
    context = zmq.Context()
    liar = context.socket(zmq.ROUTER)
    port = liar.bind_to_random_port("tcp://127.0.0.1")
    way = Way(transport="zeromq", address=f"127.0.0.1:{port}", detail=b"")
    into = store.allocate(MIB, pooled=False)
    with closing(ZeroMqReader(into)) as reader:
        arriving = reader.read(way, [Range(0, 0, 1000)], 5.0)

        def lie() -> None:
            peer, request = liar.recv_multipart()
            liar.send_multipart([peer, *(request if f == b"echo" else f for f in frames)])

        lying = threading.Thread(target=lie)
        lying.start()
        with pytest.raises(CheckpointEngineError, match=r"not asked|another length"):
            next(arriving)
        lying.join()
    context.destroy(linger=0)


def test_a_port_that_cannot_be_had(store: Store) -> None:
    with pytest.raises(TransferError, match="cannot listen on"):
        ZeroMqExporter("192.0.2.1")


def test_secrets_are_not_shown_in_messages(server: PeerServer) -> None:
    peer: Peer = server.peer
    with (
        PeerClient(msgspec.structs.replace(peer, ticket="f" * 64), SOON) as client,
        pytest.raises(DeadlineExceeded) as caught,
    ):
        client.describe()
    assert "f" * 64 not in str(caught.value)
