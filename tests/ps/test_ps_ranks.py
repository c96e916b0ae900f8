"""Parameter servers of two and three ranks, on one host and on several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from ps_tools import digests, rank_processes, version

from children import Child, call_all, free_port

Ranks = list[Child]


@pytest.fixture(scope="session")
def start_ranks(socket_folder: Any) -> Iterator[Callable[..., Ranks]]:
    """Starts the ranks of one server, each on the host that is named for it."""
    started: Ranks = []
    with ExitStack() as stack:

        def start(*hosts: str) -> Ranks:
            ranks = rank_processes(stack, hosts)
            started.extend(ranks)
            return ranks

        yield start
        for child in started:  # to end takes a second, which they may all spend at once
            child.hang_up()


@pytest.fixture(scope="session")
def shared_pairs(start_ranks: Callable[..., Ranks]) -> dict[str, Ranks]:
    return {}


@pytest.fixture(params=["one host", "two hosts"])
def pair(
    request: pytest.FixtureRequest,
    shared_pairs: dict[str, Ranks],
    start_ranks: Callable[..., Ranks],
) -> Ranks:
    """Two ranks; those on two hosts share no memory, so bytes travel."""
    if request.param not in shared_pairs:
        hosts = ("a", "a") if request.param == "one host" else ("a", "b")
        shared_pairs[request.param] = start_ranks(*hosts)
    return shared_pairs[request.param]


@pytest.fixture
def two_hosts(shared_pairs: dict[str, Ranks], start_ranks: Callable[..., Ranks]) -> Ranks:
    if "two hosts" not in shared_pairs:
        shared_pairs["two hosts"] = start_ranks("a", "b")
    return shared_pairs["two hosts"]


numbers = iter(range(1, 1000))


def bring(ranks: Ranks, seed: int, **register: Any) -> list[dict[str, Any]]:
    """An update that succeeds; each rank's report."""
    name = f"step {next(numbers)}"
    call_all(ranks, "register", name=name, seed=seed, **register)
    outcomes = call_all(ranks, "update", name=name)
    assert [outcome["outcome"] for outcome in outcomes] == ["published"] * len(ranks)
    assert call_all(ranks, "weights") == [digests(version(seed))] * len(ranks)
    call_all(ranks, "unregister", name=name)
    return outcomes


def shares(ranks: Ranks) -> list[tuple[int, int]]:
    return [(rank, len(ranks)) for rank in range(len(ranks))]


# Everything arrives everywhere


def test_every_rank_brings_its_shard_and_every_engine_gets_all(pair: Ranks) -> None:
    whole = {outcome["digest"] for outcome in bring(pair, 1)}
    sharded = {outcome["digest"] for outcome in bring(pair, 1, share=shares(pair))}
    assert len(whole | sharded) == 1, "the version's name depends on its content alone"
    assert {outcome["digest"] for outcome in bring(pair, 2, share=shares(pair))} != whole


def test_every_rank_has_the_same_report(pair: Ranks) -> None:
    first, second = bring(pair, 3, share=shares(pair))
    assert first == second
    assert sorted(replica["rank"] for replica in first["replicas"]) == [0, 1]


def test_bytes_leave_a_host_only_where_another_lacks_them(two_hosts: Ranks) -> None:
    (outcome, _) = bring(two_hosts, 4, share=shares(two_hosts))
    content = sum(tensor.nbytes for tensor in version(4).values())
    assert content <= outcome["bytes_sent"] <= outcome["bytes"], "each byte once, and some padding"
    (outcome, _) = bring(two_hosts, 4)
    assert outcome["bytes_sent"] <= outcome["bytes"]


def test_updates_and_barriers_can_be_repeated_by_several_ranks(pair: Ranks) -> None:
    """The reference reuses a barrier's key, so that the second wait does not wait."""
    call_all(pair, "register", name="again", seed=5)
    for _ in range(5):
        outcomes = call_all(pair, "update", name="again")
        assert {outcome["outcome"] for outcome in outcomes} == {"published"}
        call_all(pair, "barrier")
    call_all(pair, "unregister", name="again")


def test_a_barrier_waits_for_every_rank(two_hosts: Ranks) -> None:
    with pytest.raises(RuntimeError, match="DeadlineExceeded"):
        two_hosts[0].call("barrier", timeout=0.2)
    two_hosts[1].call("barrier", timeout=30.0)
    call_all(two_hosts, "barrier")


def test_the_handles_of_all_ranks_are_known_to_each(two_hosts: Ranks) -> None:
    for rank in two_hosts:
        rank.forget()
    bring(two_hosts, 6)
    first, second = (rank.wait_for("called")["handles"] for rank in two_hosts)
    assert first == second
    assert len({address for _, address in first}) == 2


def test_the_default_group_is_for_the_caller(pair: Ranks) -> None:
    assert call_all(pair, "join_group") == [3, 3]


def test_ranks_may_register_different_tensors_but_not_under_one_name(two_hosts: Ranks) -> None:
    numbers = [
        rank.send("register", name="contradiction", seed=seed)
        for seed, rank in enumerate(two_hosts)
    ]
    for rank, number in zip(two_hosts, numbers, strict=True):
        with pytest.raises(RuntimeError, match="UsageError: ranks 0 and 1 registered different"):
            rank.result(number)
    call_all(two_hosts, "unregister", name="contradiction")
    bring(two_hosts, 7)


# A no anywhere is a no everywhere


def test_an_engine_that_refuses_rolls_the_engines_of_other_ranks_back(pair: Ranks) -> None:
    bring(pair, 10)
    call_all(pair, "register", name="refused", seed=11)
    outcomes = call_all(pair, "update", name="refused", failing=[False, True])
    for outcome in outcomes:
        assert outcome["outcome"] == "rolled_back"
        assert "load_weights refused" in outcome["error"].splitlines()[0]
        assert "in load_weights" in outcome["error"]
    assert call_all(pair, "weights") == [digests(version(10))] * 2
    call_all(pair, "unregister", name="refused")
    bring(pair, 12)


def test_a_bit_that_flipped_in_a_ranks_memory_is_found_before_any_engine_is_called(
    two_hosts: Ranks,
) -> None:
    bring(two_hosts, 13)
    call_all(two_hosts, "register", name="damaged", seed=14, share=shares(two_hosts))
    two_hosts[1].call("flip", name="damaged")
    for rank in two_hosts:
        rank.forget()
    outcomes = call_all(two_hosts, "update", name="damaged")
    for outcome in outcomes:
        assert outcome["outcome"] == "aborted"
        assert outcome["replicas"] == []
        assert outcome["reason"]["type"] == "TransferError"
        assert "bucket" in outcome["reason"]["message"]
    assert call_all(two_hosts, "weights") == [digests(version(13))] * 2
    call_all(two_hosts, "unregister", name="damaged")
    bring(two_hosts, 15)


def test_a_bit_that_flipped_is_blamed_on_the_rank_whose_memory_it_is(two_hosts: Ranks) -> None:
    call_all(two_hosts, "register", name="damaged", seed=16, share=shares(two_hosts))
    two_hosts[1].call("flip", name="damaged")
    (outcome, _) = call_all(two_hosts, "update", name="damaged")
    message = outcome["error"]
    assert "rank 1" in message.splitlines()[0], "the first cause, not its echo elsewhere"
    assert "in the sender's memory" in message
    assert "Traceback" in message
    call_all(two_hosts, "unregister", name="damaged")
    bring(two_hosts, 17)


def test_nobody_waits_out_a_deadline_for_a_rank_that_has_said_no(
    start_ranks: Callable[..., Ranks],
) -> None:
    """Rank 2 has nothing to receive itself, and must not wait for what rank 1 will not get."""
    ranks = start_ranks("a", "b", "b")
    bring(ranks, 18, share=shares(ranks))
    call_all(ranks, "register", name="damaged", seed=19, share=shares(ranks))
    ranks[0].call("flip", name="damaged")
    outcomes = call_all(ranks, "update", name="damaged", timeout=300.0)
    assert {outcome["outcome"] for outcome in outcomes} == {"aborted"}
    call_all(ranks, "unregister", name="damaged")
    bring(ranks, 20, share=shares(ranks))


def test_a_slow_rank_hears_the_end_of_an_update_although_the_next_has_begun(
    start_ranks: Callable[..., Ranks],
) -> None:
    ranks = start_ranks("a", "a")
    call_all(ranks, "register", name="again", seed=21)
    ranks[1].call("read_slowly", seconds=0.3)
    sent = [[rank.send("update", name="again") for rank in ranks] for _ in range(3)]
    for numbers in sent:
        outcomes = [rank.result(number) for rank, number in zip(ranks, numbers, strict=True)]
        assert {outcome["outcome"] for outcome in outcomes} == {"published"}


# Death


def test_a_rank_that_dies_while_it_stages_aborts_the_others_within_the_deadline(
    start_ranks: Callable[..., Ranks],
) -> None:
    ranks = start_ranks("a", "b")
    call_all(ranks, "register", name="new", seed=22, share=shares(ranks))
    ranks[1].send("update", name="new", die_while_staging=True, timeout=2.0)
    outcome = ranks[0].call("update", name="new", timeout=2.0)
    ranks[1].kill()  # a slow one may not have come that far, and would end late
    assert outcome["outcome"] == "aborted"
    assert outcome["reason"]["type"] in ("TransferError", "DeadlineExceeded")
    assert ranks[0].call("weights") == {}


def test_ranks_whose_coordinator_dies_end_and_their_engines_keep_their_base(
    start_ranks: Callable[..., Ranks],
) -> None:
    ranks = start_ranks("a", "a")
    bring(ranks, 23)
    call_all(ranks, "register", name="new", seed=24)
    ranks[0].send("update", name="new", die_while_staging=True)
    with pytest.raises(RuntimeError, match=r"PeerLost|DeadlineExceeded"):
        ranks[1].call("update", name="new", timeout=5.0)
    assert ranks[1].call("weights") == digests(version(23))


def test_ranks_are_met_by_arguments_too(start_ranks: Callable[..., Ranks]) -> None:
    port = free_port()
    with Child("ps/ps_rank.py") as first, Child("ps/ps_rank.py") as second:
        met = call_all(
            [first, second],
            "meet",
            rank=[0, 1],
            world_size=2,
            master_addr="127.0.0.1",
            master_port=port,
        )
        assert met == [[0, 2], [1, 2]]
        bring([first, second], 25)
