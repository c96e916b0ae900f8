"""Replicas are joined to a trainer that goes on updating, by a server on a host of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fleet import Fleet
from test_faults_replica import bring

from children import Child, wait_until

Make = Callable[[], Child]
QUARANTINE: dict[str, Any] = {"on_failure": "quarantine", "min_replicas": 1}


@pytest.fixture
def make_joiner(fleet: Fleet, tmp_path: Path) -> Iterator[Make]:
    made: list[Child] = []

    def make() -> Child:
        made.append(fleet.make_joiner(tmp_path))
        return made[-1]

    yield make
    for joiner in made:
        joiner.close()
    assert list((tmp_path / "s").iterdir()) == []


def begin_to_join(fleet: Fleet, joiner: Child, name: str, metas: Any = None) -> int:
    metas = metas or fleet.trainer.call("metas")
    return joiner.send("join", metas=metas, replicas=[fleet.addresses[name]])


def check_joined(fleet: Fleet, joiner: Child, number: int, version: str) -> None:
    outcome = joiner.result(number)
    assert (outcome["outcome"], outcome["version"]) == ("published", version), outcome["error"]
    assert set(fleet.serving().values()) == {fleet.newest}
    joiner.close()
    wait_until(lambda: fleet.trainer.call("num_readers") == 0, "the end of leases")
    fleet.check()


def test_a_quarantined_replica_is_brought_back(fleet: Fleet, make_joiner: Make) -> None:
    bring(fleet)
    fleet.arm("replica 1", "check", "refuse")
    outcome = fleet.update(**QUARANTINE)
    assert outcome is not None
    assert outcome["outcome"] == "published"
    assert fleet.replicas["replica 1"].call("info")["state"] == "quarantined"
    joiner = make_joiner()
    check_joined(fleet, joiner, begin_to_join(fleet, joiner, "replica 1"), fleet.newest)


def test_who_is_in_the_trainers_update_joins_afterwards(fleet: Fleet, make_joiner: Make) -> None:
    """The joiner is refused there, waits for that update's end, and then brings its version."""
    bring(fleet)
    metas = fleet.trainer.call("metas")
    fleet.arm("replica 0", "prepare", "hold")
    fleet.arm("rank 0", "deciding", "hang")  # the joiner asks before the end
    numbers = fleet.begin(fleet.register())
    fleet.replicas["replica 0"].wait_for("fault")
    joiner = make_joiner()
    joiner.call("arm", point="finished", what="tell")
    joining = begin_to_join(fleet, joiner, "replica 0", metas)
    joiner.wait_for("fault")
    fleet.replicas["replica 0"].call("recover")
    outcome = fleet.finish(numbers)
    assert outcome is not None
    assert outcome["outcome"] == "published", outcome["error"]
    check_joined(fleet, joiner, joining, fleet.newest)


def test_an_update_goes_on_without_who_is_being_joined_and_it_ends_on_the_same(
    fleet: Fleet, make_joiner: Make
) -> None:
    bring(fleet)
    fleet.arm("replica 2", "prepare", "hold")
    joiner = make_joiner()
    joining = begin_to_join(fleet, joiner, "replica 2")
    fleet.replicas["replica 2"].wait_for("fault")
    outcome = fleet.update(**QUARANTINE)
    assert outcome is not None
    assert outcome["outcome"] == "published"
    assert "another update of this replica is under way" in outcome["reason"]["message"]
    assert len(outcome["replicas"]) == 2
    fleet.replicas["replica 2"].call("recover")
    check_joined(fleet, joiner, joining, fleet.newest)


@pytest.mark.parametrize("point", ["reading", "applying", "deciding", "decided"])
def test_a_joiner_dies_and_another_takes_its_place(
    fleet: Fleet, make_joiner: Make, point: str
) -> None:
    old = bring(fleet)
    fleet.replicas["replica 0"].kill()
    fleet.start_replica("replica 0")
    joiner = make_joiner()
    joiner.call("arm", point=point, what="kill")
    with pytest.raises(RuntimeError, match="died"):
        joiner.result(begin_to_join(fleet, joiner, "replica 0"))
    assert fleet.serving()["replica 0"] == "step-0"
    joiner = make_joiner()
    check_joined(fleet, joiner, begin_to_join(fleet, joiner, "replica 0"), old)
