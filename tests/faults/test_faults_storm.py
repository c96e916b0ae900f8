"""The beginning of a storm; `make storm` is the whole of one."""

from __future__ import annotations

from fleet import Fleet
from storm import Blow, storm

SEED = 20


def test_a_few_faults_one_after_the_other(fleet: Fleet) -> None:
    storm(fleet, SEED, range(10))


def test_a_fault_can_be_repeated() -> None:
    blows = [Blow.drawn(SEED, number) for number in range(200)]
    assert blows == [Blow.drawn(SEED, number) for number in range(200)]
    assert len({str(blow) for blow in blows}) > 100
