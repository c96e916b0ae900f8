"""Whatever peers ask for or answer changes nothing, or is one of the errors that are expected."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import msgspec
import pytest
from fuzz_tools import altered, fuzzed, mutated
from hypothesis import strategies as st
from test_fuzz_messages import META, encode, plain

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.plan.routes import Holding
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.transport import peers
from checkpoint_engine.transport.peer import Way
from checkpoint_engine.transport.peers import Peer, PeerServer
from checkpoint_engine.transport.zeromq import ZeroMqExporter, _Read
from checkpoint_engine.update.protocol import decode
from checkpoint_engine.update.shelf import Description

REQUESTS = [
    peers.Describe(number=1, ticket="t", topic="whole"),
    peers.Lease(number=2, ticket="t", segment="s"),
    peers.Renew(number=3, ticket="t", lease="l"),
    peers.Return(number=4, ticket="t", lease="l"),
]
PEER = Peer(address="127.0.0.1:1", key="k" * 40, ticket="t")
DESCRIPTION = Description(
    label="v", digest="d", published=True, updating=False,
    metas=(msgspec.structs.replace(META, peer=PEER),),
    copies=(Holding(source=0, segment="s", start=0, offset=0, length=256),),
)  # fmt: skip
ANSWERS = [
    peers.Described(number=1, description=b"d"),
    peers.Leased(number=2, lease="l", ways=(Way(transport="zeromq", address="a:1", detail=b"t"),)),
    peers.Done(number=3),
    peers.Refused(number=4, reason="no"),
]


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with closing(Store()) as store:
        yield store


@pytest.fixture(scope="module")
def segment(store: Store) -> Segment:
    return store.allocate(4096, pooled=False)


@pytest.fixture(scope="module")
def server(store: Store) -> Iterator[PeerServer]:
    with closing(PeerServer("127.0.0.1", store.segment, lambda topic: b"")) as server:
        yield server


@pytest.fixture(scope="module")
def exporter() -> Iterator[ZeroMqExporter]:
    with closing(ZeroMqExporter("127.0.0.1")) as exporter:
        yield exporter


@fuzzed(st.data())
def test_requests(server: PeerServer, segment: Segment, case: st.DataObject) -> None:
    """With the right ticket now and then: what is refused then is refused in words."""
    known = {"ticket": server.peer.ticket}
    ticketed = [msgspec.structs.replace(one, **known) for one in REQUESTS]
    encoded = [msgspec.msgpack.encode(one) for one in (*REQUESTS, *ticketed)]
    data = case.draw(altered(plain(ticketed)).map(encode) | mutated(encoded))
    answer = server._answer(data)
    assert isinstance(answer, (peers.Described, peers.Refused, type(None)))
    assert answer is None or server.peer.ticket.encode() in data
    assert segment.num_leases == 1


@fuzzed(st.data())
def test_answers(case: st.DataObject) -> None:
    encoded = [msgspec.msgpack.encode(one) for one in ANSWERS]
    data = case.draw(altered(plain(ANSWERS)).map(encode) | mutated(encoded))
    try:
        answer = decode(data, peers.Answer)
    except ProtocolError:
        assert data not in encoded
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(answer), type=peers.Answer) == answer


@fuzzed(altered(plain([DESCRIPTION])).map(encode) | mutated([msgspec.msgpack.encode(DESCRIPTION)]))
def test_what_a_source_says_of_itself(case: bytes) -> None:
    try:
        found = decode(case, Description)
    except ProtocolError:
        assert case != msgspec.msgpack.encode(DESCRIPTION)
    else:
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(found), type=Description) == found


@fuzzed(st.data())
def test_reads(exporter: ZeroMqExporter, segment: Segment, case: st.DataObject) -> None:
    """Bytes are given only of a segment whose ticket was told, and only from within it."""
    way = exporter.export(segment)
    valid = [_Read(way.detail, 0, 4096), _Read(way.detail, 5, 1), _Read(b"another", 0, 1)]
    encoded = [msgspec.msgpack.encode(one) for one in valid]
    data = case.draw(altered(plain(valid)).map(encode) | mutated(encoded))
    answer = exporter._answer([data])
    exporter.withdraw(way)
    assert answer[0] == data
    if len(answer) == 2:
        asked = msgspec.msgpack.decode(data, type=_Read)
        assert asked.ticket == way.detail
        assert answer[1] == segment.memory[asked.start : asked.start + asked.length]
        assert len(answer[1]) == asked.length > 0
