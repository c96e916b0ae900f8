"""How ranks find and tell each other things."""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_tools import TIMEOUT_SECONDS, Background, pattern
from rendezvous_member import take_part
from torch.distributed import TCPStore

from checkpoint_engine.errors import DeadlineExceeded, PeerLost, UsageError
from checkpoint_engine.transport import meeting, rendezvous
from checkpoint_engine.transport.keystore import LocalKeyStore
from checkpoint_engine.transport.rendezvous import Rendezvous

MEMBER = Path(__file__).with_name("rendezvous_member.py")
VARIABLES = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def meet(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Rendezvous]]:
    """Ranks of several, in this process; rank 0 leaves last, since it keeps the keys."""
    monkeypatch.setattr(rendezvous, "LEAVE_SECONDS", 0.1)  # for members that were killed
    met: list[Rendezvous] = []

    def one(*arguments: Any) -> Rendezvous:
        met.append(Rendezvous.of_environment(*arguments))
        return met[-1]

    yield one
    for member in sorted(met, key=lambda one: -one.rank):
        member.close()


def ranks(num_ranks: int) -> list[Rendezvous]:
    """The ranks of one process, each for a thread of its own."""
    store = LocalKeyStore()
    return [Rendezvous(store, rank, num_ranks) for rank in range(num_ranks)]


# Values


@pytest.mark.parametrize("num_bytes", [0, 1, 4 << 20, (4 << 20) + 1, 13 << 20])
def test_values_of_any_size(num_bytes: int) -> None:
    one, other = ranks(2)
    one.put("key", pattern(num_bytes))
    assert other.get("key", 1) == pattern(num_bytes)


def test_a_key_that_nobody_set() -> None:
    (alone,) = ranks(1)
    with pytest.raises(DeadlineExceeded, match=r"no rank set 'key' in 0\.0 s"):
        alone.get("key", 0.01)


def test_one_waits_for_a_key() -> None:
    one, other = ranks(2)
    getting = Background(lambda: one.get("key", TIMEOUT_SECONDS))
    assert not getting.is_done(within_seconds=0.05)
    other.put("key", b"value")
    assert getting.result() == b"value"


def test_scopes_do_not_meet() -> None:
    one, other = ranks(2)
    one.scope("a").put("key", b"a")
    one.put("key", b"none")
    assert other.scope("a").get("key", 1) == b"a"
    with pytest.raises(DeadlineExceeded):
        other.scope("b").get("key", 0.01)


def test_a_counter() -> None:
    one, other = ranks(2)
    assert [one.add("n", 1), other.add("n", 2), one.fork().add("n", 0)] == [1, 3, 3]


def test_clear_deletes_what_this_rank_set() -> None:
    one, other = ranks(2)
    one.put("mine", pattern(9 << 20))
    one.fork().put("by my fork", b"")
    one.log("log").append(b"entry")
    other.put("others", b"kept")
    one.clear()
    assert other.get("others", 1) == b"kept"
    assert len(other.store) == 1
    one.clear()


# Meeting


def test_gather_is_in_the_order_of_ranks_and_can_be_repeated() -> None:
    everyone = ranks(3)
    for number in range(3):
        gathering = [
            Background(
                lambda one=one, number=number: one.gather(
                    "metas", f"{one.rank}.{number}".encode(), TIMEOUT_SECONDS
                )
            )
            for one in everyone
        ]
        expected = [f"{rank}.{number}".encode() for rank in range(3)]
        assert [done.result() for done in gathering] == [expected] * 3


def test_gather_without_one_of_the_ranks() -> None:
    one, _ = ranks(2)
    with pytest.raises(DeadlineExceeded, match="no rank set 'metas/1/1'"):
        one.gather("metas", b"", 0.05)


def test_every_barrier_of_a_name_waits_for_all() -> None:
    """The reference implementation left the key of the first behind, and the second was open."""
    one, other = ranks(2)
    for _ in range(3):
        waiting = Background(lambda: one.barrier("same", TIMEOUT_SECONDS))
        assert not waiting.is_done(within_seconds=0.05)
        other.barrier("same", TIMEOUT_SECONDS)
        waiting.result()
    with pytest.raises(DeadlineExceeded):
        one.barrier("same", 0.05)


def test_a_barrier_of_one_rank_is_open() -> None:
    (alone,) = ranks(1)
    for _ in range(3):
        alone.barrier("same", 0.05)


# Logs


def test_a_log_is_read_from_its_beginning_in_one_order() -> None:
    writers = ranks(3)

    def write(writer: Rendezvous) -> None:
        for number in range(50):
            writer.log("events").append(f"{writer.rank}.{number}".encode())

    def read_all(reader: Rendezvous) -> list[bytes]:
        log = reader.log("events")
        return [log.next(TIMEOUT_SECONDS) for _ in range(150)]

    reading = [Background(functools.partial(read_all, writer.fork())) for writer in writers]
    writing = [Background(functools.partial(write, writer)) for writer in writers]
    for done in writing:
        done.result()
    read = [done.result() for done in reading]
    assert read[0] == read[1] == read[2]
    assert isinstance(read[0], list)
    for rank in range(3):
        mine = [entry for entry in read[0] if entry.startswith(b"%d." % rank)]
        assert mine == [b"%d.%d" % (rank, number) for number in range(50)]


def test_a_log_without_a_next_entry() -> None:
    (alone,) = ranks(1)
    log = alone.log("events")
    log.append(b"one")
    assert log.next(1) == b"one"
    with pytest.raises(DeadlineExceeded):
        log.next(0.01)
    log.append(b"two")
    assert log.next(1) == b"two", "a deadline skips nothing"


# Finding each other


def test_alone_by_default() -> None:
    alone = Rendezvous.of_environment()
    assert (alone.rank, alone.world_size) == (0, 1)
    assert alone.gather("key", b"value", 0.05) == [b"value"]


def test_arguments_come_before_the_environment(
    monkeypatch: pytest.MonkeyPatch, free_port: int, meet: Callable[..., Rendezvous]
) -> None:
    """Rank 0 is a rank: `rank or int(os.environ["RANK"])` would make this one rank 1."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    monkeypatch.setenv("MASTER_PORT", "1")
    first = meet(0, 2, "127.0.0.1", free_port)
    assert (first.rank, first.world_size) == (0, 2)
    first.put("key", b"value")
    second = meet(1, 2, "127.0.0.1", free_port)
    assert second.get("key", 1) == b"value", "it listens"


def test_an_explicit_world_of_one_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    alone = Rendezvous.of_environment(0, 1)
    assert (alone.rank, alone.world_size) == (0, 1)


@pytest.mark.parametrize(
    ("rank", "world_size", "environment", "message"),
    [
        (2, 2, {}, "rank 2 is not one of world size 2"),
        (-1, 1, {}, "rank -1 is not one of world size 1"),
        (1, None, {}, "rank 1 is not one of world size 1"),
        (None, 0, {}, "rank 0 is not one of world size 0"),
        (None, None, {"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 is not one of world size 4"),
        (None, None, {"RANK": "one", "WORLD_SIZE": "2"}, "RANK='one' is not a number"),
        (None, None, {"RANK": "0", "WORLD_SIZE": ""}, "WORLD_SIZE='' is not a number"),
        (None, None, {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' is not a number"),
        (None, None, {"RANK": "²", "WORLD_SIZE": "2"}, "RANK='²' is not a number"),
        (0, 2, {}, "several ranks need MASTER_ADDR and MASTER_PORT: start them with torchrun"),
        (0, 2, {"MASTER_ADDR": "127.0.0.1"}, "several ranks need MASTER_ADDR and MASTER_PORT"),
        (0, 2, {"MASTER_PORT": "29500"}, "several ranks need MASTER_ADDR and MASTER_PORT"),
        (
            0,
            2,
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
            "MASTER_PORT='http' is not a number",
        ),
    ],
)
def test_what_cannot_be(
    monkeypatch: pytest.MonkeyPatch,
    rank: int | None,
    world_size: int | None,
    environment: dict[str, str],
    message: str,
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message):
        Rendezvous.of_environment(rank, world_size)


def test_rank_0_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, free_port: int) -> None:
    monkeypatch.setattr(meeting, "CONNECT_SECONDS", 0.5)
    with pytest.raises(DeadlineExceeded, match=f"cannot reach rank 0 at 127.0.0.1:{free_port}"):
        Rendezvous.of_environment(1, 2, "127.0.0.1", free_port)


def test_a_port_that_is_taken(free_port: int) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", free_port))
        other.listen()
        with pytest.raises(UsageError, match=f"cannot listen on 127.0.0.1:{free_port}"):
            Rendezvous.of_environment(0, 2, "127.0.0.1", free_port)


# Processes


@pytest.fixture
def start_member(
    free_port: int, socket_folder: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the process of a rank of two that meet beside MASTER_PORT."""
    running: list[subprocess.Popen[str]] = []

    def start(rank: int, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(MEMBER)],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port - 1),
                **environment,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        with process:
            process.kill()


def said_by(process: subprocess.Popen[str]) -> list[str]:
    """What a member gathered and read; call it once this process has done its part."""
    assert process.stdout is not None
    lines = []
    while (line := process.stdout.readline().strip()) != "end":
        assert line, "the member failed"
        lines.append(line)
    return lines


def test_two_processes(
    start_member: Callable[..., subprocess.Popen[str]],
    free_port: int,
    meet: Callable[..., Rendezvous],
) -> None:
    member = start_member(1)
    first = meet(0, 2, "127.0.0.1", free_port)
    seen = take_part(first)
    assert said_by(member) == seen
    assert len(seen) == 3 * 2 + 20 * 2
    assert len(set(seen)) == 4 + 20 * 2, "each round gathers other values"


def test_under_torchrun_the_launchers_store_tells_where_rank_0_is_and_nothing_else(
    start_member: Callable[..., subprocess.Popen[str]], free_port: int
) -> None:
    """The agent listens at MASTER_PORT."""
    agent = TCPStore("127.0.0.1", free_port, is_master=True, wait_for_workers=False)
    environment = {"MASTER_PORT": str(free_port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    members = [start_member(rank, **environment) for rank in range(2)]
    seen = [said_by(member) for member in members]
    assert seen[0] == seen[1]
    host, _, port = agent.get("ckpt-engine/0/address").decode().rpartition(":")
    assert host == "127.0.0.1"
    assert int(port) != free_port
    assert agent.num_keys() == 1


def test_rank_0_dies(
    start_member: Callable[..., subprocess.Popen[str]],
    free_port: int,
    meet: Callable[..., Rendezvous],
) -> None:
    member = start_member(0)
    second = meet(1, 2, "127.0.0.1", free_port)
    seen = take_part(second)
    assert said_by(member) == seen
    waiting = Background(lambda: second.get("never", TIMEOUT_SECONDS))
    member.kill()
    with pytest.raises(PeerLost, match=r"rank 0 at 127\.0\.0\.1:\d+ is gone"):
        waiting.result()
    with pytest.raises(PeerLost):
        second.put("key", b"value")


def test_the_keys_of_a_group_are_cleared_with_the_others() -> None:
    keys = LocalKeyStore()
    scope = Rendezvous(keys, 0, 1).scope("ways")
    group_store = scope.group_store("gloo")
    group_store.set("0", b"address")
    scope.put("mine", b"")
    assert len(keys) == 2
    scope.clear()
    assert len(keys) == 0
