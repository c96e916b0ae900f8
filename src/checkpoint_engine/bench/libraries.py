"""Reads from one and from four peers through a library, next to the library by itself.

Two libraries do not bear each other in one process, so a library's reader is a process of its own,
with sources of its own. Bare, the library does as its own documentation does it: everything is
registered and connected before the clock starts, and all ranges, as large as ours, are asked for at
once. What it does not do is what a fleet needs: leases, plans, digests, and deadlines of its own.

    samples = measure_library("mooncake", num_bytes, rounds=15, warmups=2, tell=print)
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import msgspec

from checkpoint_engine.bench.measure import Samples, Tell, Unavailable, run_rounds
from checkpoint_engine.bench.peers import Bare, Move, PeerReader, peer_reader
from checkpoint_engine.children import say
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    TransferError,
    UsageError,
)
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES
from checkpoint_engine.transport import mooncake, nixl
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.transport.library import address_of
from checkpoint_engine.transport.peer import Way
from checkpoint_engine.transport.transports import missing

__all__ = ["LIBRARIES", "measure_library"]

START_SECONDS, ROUND_SECONDS = 120.0, 30.0
MAX_REQUESTS = 1024  # in a batch of Mooncake's
POLL_SECONDS = 0.0005  # to ask all the time is slower: it takes the processor from the library
MEETING_BYTES = 1  # read before the clock starts, since both connect when they first read


class _Job(msgspec.Struct, frozen=True):
    """What a reader is told on its command line."""

    library: str
    num_bytes: int
    rounds: int
    warmups: int


def measure_library(
    library: str, num_bytes: int, *, rounds: int, warmups: int, tell: Tell
) -> Samples:
    """The seconds of "p2p by LIBRARY" and "bare LIBRARY", and of both "from 4", in every round.

    Args:
        library: one of `LIBRARIES`.
        num_bytes: of the version.
        rounds: how many are counted.
        warmups: rounds before those.
        tell: called at the beginning and the end.

    Raises:
        Unavailable: it is not installed, or does not start here; says why.
        PeerLost: a read failed; the last words are above.
        DeadlineExceeded: the reader did not end.
    """
    tell(f"p2p by {library}", 0, 1)
    job = _Job(library, num_bytes, rounds, warmups)
    seconds = START_SECONDS + ROUND_SECONDS * (rounds + warmups)
    try:
        reader = subprocess.run(  # noqa: S603 - our own module, typed arguments
            [sys.executable, "-m", __name__, msgspec.json.encode(job).decode()],
            capture_output=True,
            timeout=seconds,
            env={**os.environ, "CKPT_ENGINE_TRANSPORT": library},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"reads by {library} are not done in {seconds:.0f} s") from error
    tell(f"p2p by {library}", 1, 1)
    told = reader.stdout.splitlines()
    if len(told) < 2:
        sys.stderr.buffer.write(reader.stderr)
    if not told:
        raise Unavailable(f"{library} does not start here; its last words are above")
    if refusal := msgspec.json.decode(told[0], type=str):
        raise Unavailable(refusal)
    if len(told) < 2:
        raise PeerLost(f"the reader by {library} failed; its last words are above")
    return msgspec.json.decode(told[1], type=Samples)


class _Mooncake(Bare):
    """One engine for all reads: to end one stops Python for a second."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self._engine = mooncake.start_engine(own_address())
        self._start = address_of(memory)
        if status := self._engine.register_memory(self._start, len(memory)):
            raise TransferError(f"Mooncake refuses {len(memory)} bytes of memory: {status}")

    @contextmanager
    def connected(self, ways: Sequence[Way]) -> Iterator[Move]:
        """What it knows of a source, it keeps; of a new export it must hear first."""
        wanted: list[tuple[str, list[tuple[int, int, int]]]] = []
        for way, start, length in self.shares(ways):
            (source,) = msgspec.msgpack.decode(way.detail, type=tuple[int])
            ranges = _ranges(self._start, source, start, length)
            self._wait([self._begin(way.address, [(self._start, source, MEETING_BYTES)])])
            wanted += [
                (way.address, ranges[at : at + MAX_REQUESTS])
                for at in range(0, len(ranges), MAX_REQUESTS)
            ]
        yield lambda: self._wait([self._begin(*batch) for batch in wanted])

    def _begin(self, target: str, ranges: Sequence[tuple[int, int, int]]) -> int:
        into, source, lengths = (list(column) for column in zip(*ranges, strict=True))
        batch = int(self._engine.batch_transfer_async_read(target, into, source, lengths))
        if batch in mooncake.NO_BATCH:
            raise PeerLost(f"Mooncake does not reach the source at {target}")
        return batch

    def _wait(self, batches: list[int]) -> None:
        if status := self._engine.get_batch_transfer_status(batches):
            raise PeerLost(f"Mooncake lost a source: {status}")


class _Nixl(Bare):
    """An agent for each read: its thread would take the processor from what is measured next."""

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        nixl.start_agent(own_address())  # else it fails in the first round

    @contextmanager
    def connected(self, ways: Sequence[Way]) -> Iterator[Move]:
        """One agent reads from all sources."""
        agent = nixl.start_agent(own_address())
        into = address_of(self.memory)
        registered = agent.register_memory([(into, len(self.memory), 0, "")], "DRAM")
        meetings, transfers = [], []
        for way, start, length in self.shares(ways):
            source, metadata = msgspec.msgpack.decode(way.detail, type=tuple[int, bytes])
            peer = agent.add_remote_agent(metadata)
            meetings.append(_transfer(agent, peer, [(into, source, MEETING_BYTES)]))
            transfers.append(_transfer(agent, peer, _ranges(into, source, start, length)))
        _move(agent, meetings)
        yield lambda: _move(agent, transfers)
        for transfer in (*meetings, *transfers):
            transfer.release()
        agent.deregister_memory(registered)


def _transfer(agent: Any, peer: str, ranges: Sequence[tuple[int, int, int]]) -> Any:
    into = agent.get_xfer_descs([(start, length, 0) for start, _, length in ranges], "DRAM")
    source = agent.get_xfer_descs([(start, length, 0) for _, start, length in ranges], "DRAM")
    return agent.initialize_xfer("READ", into, source, peer)


def _move(agent: Any, transfers: Sequence[Any]) -> None:
    for transfer in transfers:
        agent.transfer(transfer)
    for transfer in transfers:
        while (state := agent.check_xfer_state(transfer)) == "PROC":
            time.sleep(POLL_SECONDS)
        if state != "DONE":
            raise PeerLost(f"NIXL lost a source: {state}")


def _ranges(into: int, source: int, start: int, length: int) -> list[tuple[int, int, int]]:
    """Where to, where from, and how long: as long as a range of ours is at most."""
    end = start + length
    return [
        (into + at, source + at, min(DEFAULT_BUCKET_BYTES, end - at))
        for at in range(start, end, DEFAULT_BUCKET_BYTES)
    ]


LIBRARIES: dict[str, type[Bare]] = {"mooncake": _Mooncake, "nixl": _Nixl}


# ── the reader process ──────────────────────────────────────────────────────────────────────


def _start(job: _Job, stack: ExitStack) -> PeerReader:
    if reason := missing(job.library):
        raise UsageError(f"{job.library} cannot be used here: {reason}")
    return stack.enter_context(peer_reader(job.num_bytes, LIBRARIES[job.library]))


def _main(arguments: Iterable[str]) -> NoReturn:
    """Say why the library does not start ("" if it does), and then what was measured."""
    (argument,) = arguments
    job = msgspec.json.decode(argument, type=_Job)
    with ExitStack() as stack:
        try:
            reader = _start(job, stack)
        except CheckpointEngineError as error:
            say(str(error))
        else:
            say("")
            operations = reader.operations(f"p2p by {job.library}", f"bare {job.library}")
            say(
                run_rounds(
                    operations, rounds=job.rounds, warmups=job.warmups, tell=lambda *progress: None
                )
            )
    os._exit(0)  # a library may crash at its end


if __name__ == "__main__":
    _main(sys.argv[1:])
