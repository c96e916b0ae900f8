"""Peer reads through libraries, over TCP; source and reader are processes of their own."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from transport_peer import pattern

from children import Child, spawn, wait_until

MIB = 1 << 20
NUM_BYTES = 128 * MIB
LIBRARIES = ("mooncake", "nixl")


class Parties:
    """A source, a reader, and a second of both in one process."""

    def __init__(self, transport: str, stack: ExitStack) -> None:
        def start() -> Child:
            peer = Child(
                "transport/transport_peer.py", start=spawn, CKPT_ENGINE_TRANSPORT=transport
            )
            return stack.enter_context(peer)

        self.transport = transport
        self.source, self.second, self.reader = (start() for _ in range(3))
        sources, readers = (self.source, self.second), (self.reader, self.second)
        ways = [
            source.send("export", seed=number, num_bytes=NUM_BYTES)
            for number, source in enumerate(sources, start=1)
        ]
        opened = [
            reader.send("open", transport=transport, num_bytes=NUM_BYTES) for reader in readers
        ]
        self.way, self.other_way = map(Child.result, sources, ways)
        list(map(Child.result, readers, opened))
        self.bytes = pattern(1, NUM_BYTES)

    def check(self, reader: Child, ranges: list[list[int]], content: bytes | None = None) -> None:
        content = content or self.bytes
        for start, place, length in ranges:
            expected = hashlib.sha256(content[start : start + length]).hexdigest()
            assert reader.call("digest", start=place, end=place + length) == expected


@pytest.fixture(scope="module", params=LIBRARIES)
def parties(request: pytest.FixtureRequest) -> Iterator[Parties]:
    with ExitStack() as stack:
        try:
            parties = Parties(request.param, stack)
        except RuntimeError as error:
            if "does not load" in str(error):
                pytest.skip(str(error))  # scripts/setup has said so, too
            raise
        yield parties


WHOLE = [[0, 0, NUM_BYTES]]
BUCKETS = [[at, at, 16 * MIB] for at in range(0, NUM_BYTES, 16 * MIB)]


@pytest.mark.parametrize(
    "ranges", [[[5, 3, 1]], [[12345, 77, 3 * MIB + 1]], WHOLE], ids=["byte", "unaligned", "large"]
)
def test_bytes_arrive(parties: Parties, ranges: list[list[int]]) -> None:
    parties.reader.call("read", way=parties.way, ranges=ranges)
    parties.check(parties.reader, ranges)


def test_more_small_ranges_than_a_batch_takes_arrive_in_order(parties: Parties) -> None:
    ranges = [[37 * number, 41 * number, 31] for number in range(1500)]
    parties.reader.forget()
    parties.reader.call("read", way=parties.way, ranges=ranges)
    parties.check(parties.reader, ranges[::100])
    places = [parties.reader.wait_for("arrived")["place"] for _ in ranges]
    assert places == [place for _, place, _ in ranges]


def test_two_read_from_a_source_that_computes(parties: Parties) -> None:
    blocking = parties.source.send("block")
    parties.source.wait_for("blocked")
    readers = (parties.reader, parties.second)
    numbers = [reader.send("read", way=parties.way, ranges=BUCKETS) for reader in readers]
    for reader, number in zip(readers, numbers, strict=True):
        assert reader.result(number) > 0, "times that another thread of the reader ran"
        parties.check(reader, WHOLE)
    assert not parties.source.has_answered(blocking)
    os.kill(parties.source.pid, signal.SIGUSR1)
    parties.source.result(blocking)


def test_a_source_that_hangs_is_given_up_and_writes_nothing_when_it_goes_on(
    parties: Parties,
) -> None:
    parties.reader.call("read", way=parties.way, ranges=[[0, 0, 1]])  # they have met
    os.kill(parties.source.pid, signal.SIGSTOP)
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="DeadlineExceeded: "):
                parties.reader.call("read", way=parties.way, ranges=BUCKETS, timeout_seconds=0.5)
        parties.reader.call("read", way=parties.other_way, ranges=WHOLE)
    finally:
        os.kill(parties.source.pid, signal.SIGCONT)
    # It goes on indeed, for longer than what was under way needs.
    parties.second.call("read", way=parties.way, ranges=BUCKETS * 6)
    parties.check(parties.reader, WHOLE, pattern(2, NUM_BYTES))


def test_a_way_that_was_withdrawn_leads_nowhere(parties: Parties) -> None:
    again = parties.source.call("again")
    parties.source.call("withdraw", way=again)
    parties.reader.call("read", way=parties.way, ranges=[[0, 0, MIB]])  # another lease's
    parties.source.call("withdraw", way=parties.way)
    for reader in (parties.reader, parties.second):
        with pytest.raises(RuntimeError, match=r"PeerLost|TransferError"):
            reader.call("read", way=parties.way, ranges=[[0, 0, MIB]], timeout_seconds=5)
    parties.way = parties.source.call("again")
    parties.reader.call("read", way=parties.way, ranges=[[0, 0, MIB]])
    parties.check(parties.reader, [[0, 0, MIB]])


def test_what_is_no_way_is_refused(parties: Parties) -> None:
    for detail in (b"", b"\xc0", b"\x92\x01\xc4\x03abc"):
        with pytest.raises(RuntimeError, match=r"ProtocolError|TransferError|PeerLost"):
            parties.reader.call("misread", way=parties.way, detail=detail.hex())


def test_a_source_that_dies_is_lost_and_the_reader_reads_from_another(parties: Parties) -> None:
    parties.reader.forget()
    reading = parties.reader.send("read", way=parties.way, ranges=BUCKETS * 100)
    parties.reader.wait_for("arrived")
    parties.source.kill()
    with pytest.raises(RuntimeError, match=r"PeerLost|TransferError|DeadlineExceeded"):
        parties.reader.result(reading)
    parties.reader.call("read", way=parties.other_way, ranges=WHOLE)
    parties.check(parties.reader, WHOLE, pattern(2, NUM_BYTES))
    with pytest.raises(RuntimeError, match=r"PeerLost|TransferError"):
        parties.reader.call("read", way=parties.way, ranges=[[0, 0, MIB]], timeout_seconds=5)


# Which is chosen


def test_a_source_offers_zeromq_last(parties: Parties) -> None:
    assert parties.reader.call("lists", chosen=parties.transport) == [parties.transport, "zeromq"]
    assert parties.reader.call("lists", chosen="") == ["zeromq"], "over TCP nothing is better"
    with pytest.raises(RuntimeError, match=r"UsageError: .*=pigeon cannot be used .*known are"):
        parties.reader.call("lists", chosen="pigeon")
    parties.reader.call("lists", chosen=parties.transport)


def test_only_one_library_is_loaded_and_processes_end_well(parties: Parties) -> None:
    other = next(name for name in LIBRARIES if name != parties.transport)
    for reader in (parties.reader, parties.second):
        assert reader.call("loaded") == [parties.transport]
        with pytest.raises(RuntimeError, match=f"UsageError: .*CKPT_ENGINE_TRANSPORT={other}"):
            reader.call("open", transport=other, num_bytes=1)
    for child in (parties.reader, parties.second):
        child.hang_up()
        wait_until(lambda child=child: not child.alive, "the end")
        assert child.process.returncode == 0


def test_a_third_party_adds_a_transport(tmp_path: Path) -> None:
    (tmp_path / "pigeon.py").write_text(
        "from checkpoint_engine.transport.zeromq import exporter, reader\n"
        "missing = lambda: ''\n"
        "preferred = lambda: True\n"
    )
    metadata = tmp_path / "pigeon-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: pigeon\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[checkpoint_engine.transports]\npigeon=pigeon\n")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    lists = (
        "import os\n"
        "from checkpoint_engine.transport.transports import exporters, missing\n"
        "print(len(exporters('127.0.0.1')), repr(missing('pigeon')), flush=True)\n"
        "os._exit(0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", lists],
        env={**os.environ, "PYTHONPATH": path, "CKPT_ENGINE_TRANSPORT": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "2 ''\n", done.stderr
