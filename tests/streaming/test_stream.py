"""A version from a trainer to its samplers, each a process."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from stream_crew import Crew
from stream_weights import MIB, weights

from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import digest_in_place
from children import Child, call_all

SMALL = {"bucket_size": 4 * MIB, "timeout": 60}
Meet = Callable[..., list[Child]]


def digest(seed: int, **sizes: int) -> str:
    """As a parameter server calls them."""
    return digest_in_place(TensorSource(weights(seed, **sizes))).digest


def stream(ranks: list[Child], seed: int, **options: Any) -> tuple[Any, list[Any]]:
    sent = ranks[0].send("send", seed=seed, **options)
    received = [rank.send("receive", seed=seed, **options) for rank in ranks[1:]]
    report = ranks[0].result(sent)
    return report, [rank.result(one) for rank, one in zip(ranks[1:], received, strict=True)]


def check(ranks: list[Child], seed: int, **options: Any) -> Any:
    report, received = stream(ranks, seed, **options)
    assert report["digest"] == digest(seed, **options)
    for one in received:
        assert one["names"] == list(weights(seed, **options))
        assert one["version"]["digest"] == report["digest"]
        assert one["version"]["label"] == report["label"]
    return report


@pytest.mark.parametrize("kind", ["gloo", "shm"])
@pytest.mark.parametrize("num", [2, 3, 4])
def test_every_receiver_gets_every_byte(meet: Meet, kind: str, num: int) -> None:
    ranks = meet(kind, num, SMALL)
    first = check(ranks, 1)
    assert first["num_tensors"] == len(weights(1))
    assert first["num_buckets"] > 2 * 3, "two tensors are larger than a bucket"
    assert check(ranks, 2)["digest"] != first["digest"]


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_trainer_without_samplers_sends_to_nobody(meet: Meet, kind: str) -> None:
    assert check(meet(kind, 1, SMALL), 1)["num_buckets"] > 1


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_the_smallest_buckets_count(meet: Meet, kind: str) -> None:
    large = {**SMALL, "bucket_size": 64 * MIB}
    num_small = check(meet(kind, 3, SMALL), 1)["num_buckets"]
    assert check(meet(kind, 3, large, large, SMALL), 1)["num_buckets"] == num_small
    assert check(meet(kind, 3, large), 1)["num_buckets"] == 1


def test_the_way_is_made_anew_in_each_cycle_if_so_wished(meet: Meet) -> None:
    ranks = meet("gloo", 3, {**SMALL, "rebuild_group": True})
    for seed in range(3):
        check(ranks, seed)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_receiver_may_write_into_what_it_gets(meet: Meet, kind: str) -> None:
    ranks = meet(kind, 2, SMALL)
    for _ in range(2):
        sent = ranks[0].send("send", seed=1)
        ranks[1].call("receive", seed=1, scribble=True)
        ranks[0].result(sent)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_receiver_may_come_late(meet: Meet, kind: str) -> None:
    ranks = meet(kind, 3, SMALL)
    sent = ranks[0].send("send", seed=1)
    first = ranks[1].send("receive", seed=1)
    assert not ranks[0].has_answered(sent)
    assert ranks[2].call("receive", seed=1)["names"] == list(weights(1))
    assert ranks[1].result(first)["names"] == list(weights(1))
    assert ranks[0].result(sent)["digest"] == digest(1)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_who_never_comes_is_named_on_both_sides(meet: Meet, kind: str) -> None:
    ranks = meet(kind, 3, {**SMALL, "timeout": 1})
    sent, first = ranks[0].send("send", seed=1), ranks[1].send("receive", seed=1)
    with pytest.raises(RuntimeError, match=r"DeadlineExceeded: rank 2 .* did not come in 1 s"):
        ranks[0].result(sent)
    with pytest.raises(RuntimeError, match=r"DeadlineExceeded: the sender gave up: rank 2 .* not"):
        ranks[1].result(first)
    with pytest.raises(RuntimeError, match="DeadlineExceeded: the sender sent nothing in 1 s"):
        ranks[2].call("receive", seed=1)


@pytest.mark.parametrize(
    ("kind", "dies"),
    [
        ("gloo", {"die_after": 2}),
        ("gloo", {"die_within": 0.02}),  # bytes are on their way to it, which gloo may not notice
        ("gloo", {"die_within": 0.1}),
        ("gloo", {"die_joining": True}),
        ("gloo", {"die_connecting": 0}),  # where it listens, they find nobody
        ("gloo", {"die_connecting": 0.5}),  # some are connected to it, others never will be
        ("shm", {"die_after": 2}),
        ("shm", {"die_joining": True}),
    ],
)
def test_a_receiver_that_dies_is_named_and_may_be_replaced(
    crew: Crew, kind: str, dies: dict[str, float]
) -> None:
    """Also while the others form a group with it; no other receiver could see that."""
    settings = {**SMALL, "timeout": 1000}  # longer than a test may take
    ranks = crew.meet(kind, 4, settings)
    sent, first, third = (
        ranks[0].send("send", seed=1, num_large=20),
        ranks[1].send("receive", seed=1, num_large=20),
        ranks[3].send("receive", seed=1, num_large=20),
    )
    ranks[2].send("receive", seed=1, num_large=20, **dies)
    with pytest.raises(RuntimeError, match="PeerLost: rank 2 died"):
        ranks[0].result(sent)
    for rank, receives in ((ranks[1], first), (ranks[3], third)):
        with pytest.raises(RuntimeError, match="PeerLost: the sender gave up: rank 2 died"):
            rank.result(receives)
    ranks[2].process.wait(10)
    ranks[2] = crew.come_back(2, kind, 4, settings)
    check(ranks, 2)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_receiver_that_dies_while_another_is_awaited_is_named(crew: Crew, kind: str) -> None:
    settings = {**SMALL, "timeout": 1000}  # longer than a test may take
    ranks = crew.meet(kind, 3, settings)
    sent = ranks[0].send("send", seed=1)
    ranks[1].send("receive", seed=1, say_joining=True)
    ranks[1].wait_for("joining")
    ranks[1].kill()
    with pytest.raises(RuntimeError, match="PeerLost: rank 1 died"):
        ranks[0].result(sent)
    ranks[1] = crew.come_back(1, kind, 3, settings)
    check(ranks, 2)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_sender_that_dies_is_noticed(crew: Crew, kind: str) -> None:
    ranks = crew.meet(kind, 3, SMALL)
    ranks[0].send("send", seed=1, die_after=6)
    for rank, number in [(rank, rank.send("receive", seed=1)) for rank in ranks[1:]]:
        with pytest.raises(RuntimeError, match="PeerLost: the sender is gone"):
            rank.result(number)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_slow_receiver_is_waited_for_until_the_deadline(meet: Meet, kind: str) -> None:
    ranks = meet(kind, 3, SMALL)
    sent, first = ranks[0].send("send", seed=1), ranks[1].send("receive", seed=1)
    ranks[2].call("receive", seed=1, pause=0.3, pause_at=1)
    ranks[1].result(first)
    ranks[0].result(sent)

    ranks = meet(kind, 3, {**SMALL, "timeout": 5})
    sent, first = ranks[0].send("send", seed=1), ranks[1].send("receive", seed=1)
    last = ranks[2].send("receive", seed=1, pause=14, pause_at=1)
    with pytest.raises(RuntimeError, match="DeadlineExceeded: rank 2 had no room for bucket"):
        ranks[0].result(sent)
    for rank, receives in ((ranks[1], first), (ranks[2], last)):
        with pytest.raises(RuntimeError, match="DeadlineExceeded: the sender gave up: rank 2 had"):
            rank.result(receives)
    check(ranks, 2)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_receiver_that_hangs_is_named(meet: Meet, kind: str) -> None:
    ranks = meet(kind, 4, {**SMALL, "timeout": 3})
    received = [ranks[rank].send("receive", seed=1) for rank in (1, 2)]
    last = ranks[3].send("receive", seed=1, hang_after=2)
    try:
        with pytest.raises(RuntimeError, match="DeadlineExceeded: rank 3 ha"):
            ranks[0].call("send", seed=1)
        for rank, number in zip(ranks[1:3], received, strict=True):
            with pytest.raises(RuntimeError, match="DeadlineExceeded: the sender gave up: rank 3 "):
                rank.result(number)
    finally:
        os.kill(ranks[3].pid, signal.SIGCONT)
    with pytest.raises(RuntimeError, match="DeadlineExceeded: the sender gave up: rank 3 ha"):
        ranks[3].result(last)
    check(ranks, 2)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_consumer_that_leaves_ends_the_cycle_for_all(meet: Meet, kind: str) -> None:
    ranks = meet(kind, 3, SMALL)
    sent, first = ranks[0].send("send", seed=1), ranks[1].send("receive", seed=1)
    ranks[2].call("receive", seed=1, stop_after=2)
    with pytest.raises(RuntimeError, match="UsageError: rank 2 gave up: its consumer left"):
        ranks[0].result(sent)
    with pytest.raises(RuntimeError, match="UsageError: the sender gave up: rank 2 gave up: its"):
        ranks[1].result(first)
    check(ranks, 2)


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_trainer_that_fails_says_so_to_all(meet: Meet, kind: str) -> None:
    ranks = meet(kind, 3, SMALL)
    received = [rank.send("receive", seed=1) for rank in ranks[1:]]
    with pytest.raises(RuntimeError, match="RuntimeError: the trainer has no such tensor"):
        ranks[0].call("send", seed=1, fail_after=5)
    for rank, number in zip(ranks[1:], received, strict=True):
        with pytest.raises(RuntimeError, match=r"the sender gave up: .*the trainer has no such"):
            rank.result(number)
    check(ranks, 2)


@pytest.mark.parametrize(
    ("kind", "world_size", "words"),
    [
        ("shm", 2, r"rank 1 receives with another engine \(shm"),
        ("gloo", 3, "world_size is 2 at rank 0, and 3 here"),
    ],
)
def test_a_receiver_that_was_told_something_else_is_told_so(
    crew: Crew, kind: str, world_size: int, words: str
) -> None:
    ranks = crew.meet("gloo", 2, SMALL)
    ranks[1].call("finalize")
    crew.come_back(1, kind, world_size, SMALL)
    receives = ranks[1].send("receive", seed=1)
    for rank, number in ((ranks[0], ranks[0].send("send", seed=1)), (ranks[1], receives)):
        with pytest.raises(RuntimeError, match=f"UsageError: .*{words}"):
            rank.result(number)


def test_nobody_comes_in_with_another_secret(crew: Crew) -> None:
    (trainer,) = crew.meet("gloo", 1, SMALL)
    metadata = trainer.call("finalize") or trainer.call(
        "make", kind="gloo", is_master=True, settings=SMALL
    )
    with Child("streaming/stream_member.py", CKPT_ENGINE_SECRET="x" * 32) as stranger:
        stranger.call("make", kind="gloo", is_master=False, settings=SMALL)
        with pytest.raises(RuntimeError, match=r"UsageError: .*the same CKPT_ENGINE_SECRET"):
            stranger.call("meet", rank=1, world_size=2, metadata=metadata)


def test_compressed_buckets_arrive_as_they_were(meet: Meet) -> None:
    ranks = meet("gloo", 3, {**SMALL, "compression": "zstd"})
    check(ranks, 1)
    check(ranks, 2)


def test_the_environment_says_where_to_meet(crew: Crew, free_port: int) -> None:
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    script = "streaming/stream_member.py"
    with Child(script, **variables) as trainer, Child(script, **variables) as sampler:
        ranks = [trainer, sampler]
        call_all(ranks, "make", kind="gloo", is_master=[True, False], settings=SMALL)
        call_all(ranks, "meet", rank=[0, 1], world_size=2)
        check(ranks, 1)
        sampler.call("finalize")
        trainer.call("finalize")


@pytest.mark.parametrize("kind", ["gloo", "shm"])
def test_a_sharded_trainer_s_first_process_sends_for_both(
    crew: Crew, kind: str, free_port: int
) -> None:
    """Three samplers receive, bit for bit, what two processes with FSDP2 have a half of each."""
    first, *samplers = crew.meet(kind, 4, SMALL)
    second = crew.child(4)
    second.call("make", kind=kind, is_master=False, settings=SMALL)
    second.call("meet", rank=-1, world_size=4)
    received = [sampler.send("receive_sharded") for sampler in samplers]
    sent, _ = call_all([first, second], "send_sharded", rank=[0, 1], port=free_port)
    taken = [sampler.result(one) for sampler, one in zip(samplers, received, strict=True)]
    assert sent["num_tensors"] == 5
    assert taken == [dict.fromkeys(taken[0], True)] * 3
