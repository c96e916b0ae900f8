"""The keys that rank 0 keeps: who may use them, and what happens when it or the link is gone."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from itertools import chain
from pathlib import Path

import msgspec
import pytest
import torch
import torch.distributed as dist
import zmq
from core_tools import MIB, TIMEOUT_SECONDS, Background, pattern

from checkpoint_engine.errors import (
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    TransferError,
    UsageError,
)
from checkpoint_engine.transport import keystore, meeting
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.transport.group_store import GroupStore
from checkpoint_engine.transport.keystore import KeyClient, KeyServer, KeyStore, LocalKeyStore
from checkpoint_engine.transport.line import Line
from checkpoint_engine.transport.meeting import Meeting
from checkpoint_engine.transport.secret import credentials
from link import Link

SERVER = Path(__file__).with_name("keystore_server.py")
SECRET = "of all ranks of these tests"
OTHER_SECRET = "of the ranks of another server"
KNOWN = credentials(SECRET.encode())
SETTINGS = ["ADDRESS", "SECRET", "SECRET_FILE"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*(f"CKPT_ENGINE_{one}" for one in SETTINGS), "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[KeyServer]:
    with closing(KeyServer("127.0.0.1", 0, KNOWN)) as server:
        yield server


@pytest.fixture
def connect() -> Iterator[Callable[..., KeyClient]]:
    with ExitStack() as stack:

        def client_of(port: int, secret: str = SECRET) -> KeyClient:
            client = KeyClient(f"127.0.0.1:{port}", credentials(secret.encode()))
            return stack.enter_context(closing(client))

        yield client_of


@pytest.fixture(params=["in memory", "over a socket"])
def store(
    request: pytest.FixtureRequest, server: KeyServer, connect: Callable[..., KeyClient]
) -> KeyStore:
    return LocalKeyStore() if request.param == "in memory" else connect(server.port)


@pytest.fixture
def process() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server in a process of its own, and its port."""
    with subprocess.Popen(
        [sys.executable, str(SERVER), "127.0.0.1", "0", SECRET],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, int(process.stdout.readline())
        process.kill()


# What every store does


def test_values(store: KeyStore) -> None:
    for value in (b"", b"value", pattern(40 * MIB)):
        store.set("key", value)
        assert store.get("key", TIMEOUT_SECONDS) == value
    store.set("other", b"")
    assert [store.delete("key", "other", "none"), store.delete("key")] == [2, 0]
    with pytest.raises(DeadlineExceeded, match=r"no rank set 'key' in 0\.0 s"):
        store.get("key", 0)


def test_a_wait_ends_when_the_key_is_set(store: KeyStore) -> None:
    waiting = store.fork()
    got = Background(lambda: waiting.get("key", TIMEOUT_SECONDS))
    counted = store.fork()
    counting = Background(lambda: counted.get("counter", TIMEOUT_SECONDS))
    assert not got.is_done(within_seconds=0.05)
    store.set("another", b"")
    assert not got.is_done(within_seconds=0.05)
    store.set("key", b"value")
    assert got.result() == b"value"
    assert store.add("counter", 2) == 2
    assert counting.result() == b"2"
    waiting.close()
    counted.close()


def test_who_gave_a_wait_up_is_not_answered_late(store: KeyStore) -> None:
    with pytest.raises(DeadlineExceeded):
        store.get("late", 0.01)
    store.set("late", b"late")
    store.set("key", b"value")
    assert store.get("key", TIMEOUT_SECONDS) == b"value"


def test_counters_miss_nothing(store: KeyStore) -> None:
    def count(counter: KeyStore) -> None:
        for _ in range(100):
            counter.add("n", 1)

    forks = [store.fork() for _ in range(4)]
    for counting in [Background(lambda one=one: count(one)) for one in forks]:
        counting.result()
    assert store.add("n", -400) == 0
    for fork in forks:
        fork.close()


def test_entries_of_a_list_are_numbered_and_none_is_lost(store: KeyStore) -> None:
    waiting = store.fork()
    got = Background(lambda: waiting.get("list/1", TIMEOUT_SECONDS))

    def append(to: KeyStore, who: int) -> list[int]:
        return [to.append("list", f"{who} {number}".encode()) for number in range(50)]

    forks = [store.fork() for _ in range(3)]
    appending = [Background(lambda n=n, one=one: append(one, n)) for n, one in enumerate(forks)]
    numbers = [one.result() for one in appending]
    assert sorted(chain(*numbers)) == list(range(1, 151))
    for who, own in enumerate(numbers):
        entries = [store.get(f"list/{number}", 0) for number in own]
        assert entries == [f"{who} {number}".encode() for number in range(50)]
    assert got.result() == store.get("list/1", 0)
    assert store.get("list/length", 0) == b"150"
    for fork in (*forks, waiting):
        fork.close()


# Sizes and numbers


def test_what_is_no_counter(server: KeyServer, connect: Callable[..., KeyClient]) -> None:
    client = connect(server.port)
    client.set("key", b"value")
    with pytest.raises(ProtocolError, match="'key' is no counter"):
        client.add("key", 1)
    assert client.get("key", 1) == b"value"
    client.set("list/length", b"value")
    with pytest.raises(ProtocolError, match="'list/length' is no counter"):
        client.append("list", b"entry")


def test_what_is_too_large_for_a_message_is_not_sent(
    server: KeyServer, connect: Callable[..., KeyClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keystore, "MAX_VALUE_BYTES", 1000)
    client = connect(server.port)
    client.set("key", bytes(1000))
    for send in (client.set, client.append):
        with pytest.raises(UsageError, match="1001 bytes are more than 1000"):
            send("key", bytes(1001))


def test_256_clients(server: KeyServer, connect: Callable[..., KeyClient]) -> None:
    with ExitStack() as stack:
        first = connect(server.port)
        clients = [stack.enter_context(closing(first.fork())) for _ in range(256)]
        for client in clients:
            client.add("met", 1)
        assert first.get("met", 1) == b"256"
        waiting = [Background(lambda one=one: one.get("go", TIMEOUT_SECONDS)) for one in clients]
        first.set("go", b"on")
        assert {one.result() for one in waiting} == {b"on"}


# Who may use it


def test_another_secret_opens_nothing(server: KeyServer, connect: Callable[..., KeyClient]) -> None:
    stranger, friend = connect(server.port, OTHER_SECRET), connect(server.port)
    with pytest.raises(PeerLost, match="gone, or has hung up"):
        stranger.set("key", b"theirs")
    with pytest.raises(DeadlineExceeded):
        friend.get("key", 0)


def test_the_servers_public_key_alone_opens_nothing(server: KeyServer) -> None:
    context = zmq.Context()
    line = Line(context, server.address, max_message_bytes=MIB, server_key=KNOWN.server.public)
    try:
        request = keystore.Set(number=1, key="key", value=b"theirs")
        line.socket.send(msgspec.msgpack.encode(request))
        with pytest.raises(PeerLost):
            line.receive(TIMEOUT_SECONDS)
    finally:
        line.close()
        context.term()


def test_an_impostor_is_not_told_anything(connect: Callable[..., KeyClient]) -> None:
    """Who listens in rank 0's place, but does not know the secret."""
    other = credentials(OTHER_SECRET.encode())
    with closing(KeyServer("127.0.0.1", 0, other._replace(client=KNOWN.client))) as impostor:
        with pytest.raises(PeerLost):
            connect(impostor.port).set("key", b"secret")
        assert impostor._values.of == {}


GARBAGE = [
    [],
    [b""],
    [b"\xc1"],
    [b"\x91" * 5000],
    [msgspec.msgpack.encode({"type": "Set", "number": 1, "key": "key", "value": 3})],
    [msgspec.msgpack.encode({"type": "Get", "number": 1, "key": "key", "milliseconds": -1})],
    [msgspec.msgpack.encode({"type": "Get", "number": 1, "key": "k", "milliseconds": 1 << 63})],
    [msgspec.msgpack.encode({"type": "Add", "number": 1, "key": "key", "amount": float("nan")})],
    [msgspec.msgpack.encode({"type": "Exec", "number": 1, "key": "key"})],
    [msgspec.msgpack.encode(keystore.Set(number=1, key="key", value=b"x")), b"and more"],
]


def test_garbage_of_a_rank_changes_nothing(
    server: KeyServer, connect: Callable[..., KeyClient]
) -> None:
    context = zmq.Context()
    line = Line(
        context,
        server.address,
        max_message_bytes=MIB,
        server_key=KNOWN.server.public,
        own_keys=KNOWN.client,
    )
    try:
        for frames in GARBAGE:
            line.socket.send_multipart(frames or [b"", b""])
        with pytest.raises(DeadlineExceeded):
            line.receive(0.1)
        assert server._values.of == {}
        connect(server.port).set("key", b"value")
    finally:
        line.close()
        context.term()


def test_noise_on_the_port_changes_nothing(
    server: KeyServer, connect: Callable[..., KeyClient]
) -> None:
    for noise in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\xff" + bytes(63)):
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.sendall(noise)
            connect(server.port).set("key", b"value")


def test_it_listens_at_one_address(server: KeyServer) -> None:
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [fields[1] for fields in lines if fields[3] == "0A"]
    here = [place for place in listening if int(place.split(":")[1], 16) == server.port]
    assert here == [f"0100007F:{server.port:04X}"]
    assert f":{server.port:04X} " not in Path("/proc/net/tcp6").read_text()


# Whoever keeps the keys is gone


def test_a_server_that_is_killed_is_noticed_and_one_in_its_place_is_used(
    process: tuple[subprocess.Popen[str], int], connect: Callable[..., KeyClient]
) -> None:
    killed, port = process
    client = connect(port)
    client.set("key", b"value")
    waiting = client.fork()
    got = Background(lambda: waiting.get("never", 600.0))
    assert not got.is_done(within_seconds=0.1)
    killed.kill()
    killed.wait()
    with pytest.raises(PeerLost, match=rf"rank 0 at 127\.0\.0\.1:{port} is gone"):
        got.result()
    with pytest.raises(PeerLost):
        client.set("key", b"value")
    with closing(KeyServer("127.0.0.1", port, KNOWN)):
        client.set("key", b"again")
        assert waiting.get("key", 1) == b"again"
    waiting.close()


def test_a_server_that_stands_still_is_waited_for_until_the_deadline(
    process: tuple[subprocess.Popen[str], int],
    connect: Callable[..., KeyClient],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keystore, "ANSWER_SECONDS", 0.2)
    stopped, port = process
    client, known = connect(port), connect(port)
    known.set("key", b"value")
    stopped.send_signal(signal.SIGSTOP)
    for one in (client, known):  # a connection that is new, and one that was there
        with pytest.raises(DeadlineExceeded, match="said nothing"):
            one.get("key", 0.2)
        with pytest.raises(DeadlineExceeded, match="said nothing"):
            one.set("key", b"late")
    stopped.send_signal(signal.SIGCONT)
    monkeypatch.setattr(keystore, "ANSWER_SECONDS", TIMEOUT_SECONDS)
    client.set("key", b"new")
    assert known.get("key", TIMEOUT_SECONDS) == b"new"


def test_a_link_that_was_down_is_used_again(
    server: KeyServer, connect: Callable[..., KeyClient]
) -> None:
    with closing(Link(server.port)) as link:
        client, near = connect(link.port), connect(server.port)
        client.set("key", b"value")
        link.down()
        with pytest.raises(DeadlineExceeded):
            client.get("key", 0.1)
        near.set("key", b"meanwhile")
        link.up()
        assert client.get("key", TIMEOUT_SECONDS) == b"meanwhile"
        waiting = client.fork()
        got = Background(lambda: waiting.get("never", 600.0))
        assert not got.is_done(within_seconds=0.1)
        link.cut()
        with pytest.raises(PeerLost):
            got.result()
        assert client.get("key", TIMEOUT_SECONDS) == b"meanwhile", "it broke while nobody asked"
        waiting.close()


def test_a_connection_that_breaks_when_it_is_used_again_is_made_anew(
    server: KeyServer, connect: Callable[..., KeyClient]
) -> None:
    """As one that the other host has forgotten; whoever asks is not to fail for it."""
    with closing(Link(server.port)) as link:
        client, near = connect(link.port), connect(server.port)
        client.set("key", b"value")
        got = Background(lambda: client.get("later", TIMEOUT_SECONDS))
        assert not got.is_done(within_seconds=0.1)
        link.cut()
        near.set("later", b"value")
        assert got.result() == b"value"


# How ranks find it


def test_the_address_of_this_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_address() == "127.0.0.1"
    for master in ("localhost", "127.0.0.1", "127.0.1.1"):
        monkeypatch.setenv("MASTER_ADDR", master)
        assert own_address().startswith("127.")
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with pytest.raises(UsageError, match=r"MASTER_ADDR='nowhere\.invalid'.*CKPT_ENGINE_ADDRESS"):
        own_address()
    monkeypatch.setenv("CKPT_ENGINE_ADDRESS", "10.1.2.3")
    assert own_address() == "10.1.2.3"


def test_ranks_of_one_host_find_a_secret_that_nobody_else_reads(
    socket_folder: Path, free_port: int
) -> None:
    meeting = Meeting("localhost", free_port, by_launcher=False)
    with closing(meeting.keep()), closing(meeting.reach()) as store:
        store.set("key", b"value")
        (file,) = socket_folder.iterdir()
        assert file.name == f"secret-{free_port}"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert len(file.read_bytes()) == 64
    assert list(socket_folder.iterdir()) == []


def test_what_a_killed_rank_0_has_left_does_not_mislead(
    socket_folder: Path, free_port: int
) -> None:
    meeting = Meeting("localhost", free_port, by_launcher=False)
    socket_folder.mkdir(mode=0o700)
    (socket_folder / f"secret-{free_port}").write_text(OTHER_SECRET)
    reaching = Background(meeting.reach)
    assert not reaching.is_done(within_seconds=0.1)
    with closing(meeting.keep()):
        store = reaching.result()
        assert isinstance(store, KeyClient)
        store.close()


@pytest.mark.parametrize("variable", ["CKPT_ENGINE_SECRET", "CKPT_ENGINE_SECRET_FILE"])
def test_a_secret_that_is_given_is_not_left_in_a_file(
    variable: str,
    socket_folder: Path,
    tmp_path: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    monkeypatch.setenv(variable, SECRET if variable.endswith("SECRET") else str(file))
    meeting = Meeting("localhost", free_port, by_launcher=False)
    with closing(meeting.keep()), closing(meeting.reach()) as store:
        store.set("key", b"value")
        with closing(KeyClient(f"127.0.0.1:{free_port}", KNOWN)) as known:
            assert known.get("key", 1) == b"value"
        assert not socket_folder.exists()


def test_a_rank_with_another_secret_is_told_so(
    socket_folder: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meeting, "HANG_UP_SECONDS", 0.2)
    place = Meeting("localhost", free_port, by_launcher=False)
    monkeypatch.setenv("CKPT_ENGINE_SECRET", OTHER_SECRET)
    with (
        closing(KeyServer("127.0.0.1", free_port, KNOWN)),
        pytest.raises(UsageError, match="every rank needs the same CKPT_ENGINE_SECRET"),
    ):
        place.reach()


def test_a_rank_of_another_host_that_has_no_secret_is_told_so(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_ADDRESS", "127.0.0.1")
    place = Meeting("127.0.0.1", 4711, by_launcher=False)
    place._host, place._is_one_host = "192.0.2.1", False
    with pytest.raises(UsageError, match=r"another host, 192\.0\.2\.1.*need CKPT_ENGINE_SECRET"):
        place.reach()


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("CKPT_ENGINE_SECRET", "short", "CKPT_ENGINE_SECRET: a secret has 16 characters or more"),
        ("CKPT_ENGINE_SECRET_FILE", "/nowhere", "'/nowhere': No such file"),
        ("CKPT_ENGINE_SECRET_FILE", "/dev/null", "'/dev/null': a secret has 16 characters"),
    ],
)
def test_a_secret_that_is_none(
    variable: str, value: str, message: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=message):
        Meeting("localhost", free_port, by_launcher=False).keep()


# What torch does with it


def test_torchs_own_group_works_on_it(server: KeyServer, connect: Callable[..., KeyClient]) -> None:
    store = GroupStore(connect(server.port).fork(), "default/")
    try:
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        group = dist.new_group([0])
        total = torch.tensor(3)
        dist.all_reduce(total, group=group)
        dist.barrier()
        assert int(total) == 3
        dist.destroy_process_group()
        assert {key.split("/")[0] for key in server._values.of} == {"default"}
    finally:
        store.close()


def test_torchs_wait_ends_at_its_deadline() -> None:
    store = GroupStore(LocalKeyStore(), "")
    store.set("a", "text")
    store.wait(["a"])
    assert (store.get("a"), store.check(["a"]), store.check(["a", "b"])) == (b"text", True, False)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        store.wait(["a", "b"], timedelta(seconds=0.05))
    assert time.monotonic() - begin >= 0.05


def test_a_wait_ends_when_the_group_is_abandoned() -> None:
    """Torch waits in threads of its own, which whoever closes must not wait for in turn."""
    store = GroupStore(LocalKeyStore(), "")
    waiting = Background(lambda: store.wait(["never"], timedelta(hours=1)))
    time.sleep(0.3)  # more than one look
    store.close()
    with pytest.raises(TransferError, match="abandoned while it was made"):
        waiting.result()
    with pytest.raises(TransferError, match="abandoned while it was made"):
        store.set("late", b"")  # which would connect again
