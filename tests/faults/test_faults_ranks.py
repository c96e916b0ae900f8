"""Two hosts: the second rank fails, or the link between them does."""

from __future__ import annotations

import signal

import pytest
from fleet import SHORT_SECONDS, Fleet
from test_faults_replica import bring

from children import wait_until


def check_kept(hosts: Fleet, old: str) -> None:
    assert set(hosts.serving().values()) == {old}
    hosts.check()


@pytest.mark.parametrize("what", ["kill", "stop", "raise"])
@pytest.mark.parametrize("point", ["staging", "applying"])
def test_the_second_rank_fails(hosts: Fleet, what: str, point: str) -> None:
    """Before the decision: nobody changes. One that was killed is started with its group."""
    old = bring(hosts)
    hosts.arm("rank 1", point, what)
    outcome = hosts.update(timeout=SHORT_SECONDS)
    assert outcome is not None
    assert outcome["outcome"] in ("aborted", "rolled_back")
    check_kept(hosts, old)


@pytest.mark.parametrize("what", ["kill", "stop"])
def test_the_second_rank_fails_when_its_replica_was_told(hosts: Fleet, what: str) -> None:
    bring(hosts)
    hosts.arm("rank 1", "telling", what)
    outcome = hosts.update(timeout=SHORT_SECONDS)
    assert outcome is not None
    hosts.serving()
    hosts.check()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_link_breaks_while_bytes_travel(hosts: Fleet, rank: int) -> None:
    old = bring(hosts)
    hosts.arm(f"rank {rank}", "moving", "cut")
    outcome = hosts.update()
    assert outcome is not None
    assert (outcome["outcome"], outcome["reason"]["type"]) == ("aborted", "TransferError")
    assert "bucket" in outcome["reason"]["message"]
    check_kept(hosts, old)


@pytest.mark.parametrize("breaks", ["down", "cut"])
def test_the_link_to_the_coordinator_breaks_while_replicas_are_paused(
    hosts: Fleet, breaks: str
) -> None:
    """The rank beyond it hears no more; its replica returns to the base by itself.

    Where connections broke but the link is up, a rank may come back in time: then all go on.
    """
    old = bring(hosts)
    hosts.arm("replica 1", "check", "stop")
    numbers = hosts.begin(hosts.register(), timeout=SHORT_SECONDS)
    wait_until(lambda: hosts.replicas["replica 1"].stopped, "the stop")
    assert hosts.link is not None
    getattr(hosts.link, breaks)()
    hosts.replicas["replica 1"].signal(signal.SIGCONT)
    outcome = hosts.finish(numbers)
    assert outcome is not None
    if breaks == "cut" and outcome["outcome"] == "published":
        check_kept(hosts, hosts.newest)
    else:
        assert outcome["outcome"] in ("aborted", "rolled_back")
        check_kept(hosts, old)
