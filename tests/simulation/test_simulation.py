"""Every state, every role, every fault; and as many random schedules as there is time for."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Iterator

import pytest
from sim_parts import Fault
from sim_world import Shape, World

SEED = int(os.environ.get("SIMULATION_SEED", "20261125"))
NUM_SCHEDULES = int(os.environ.get("SIMULATION_SCHEDULES", "2000"))
OF_PROCESSES = ("crash", "hang", "slow")
OF_REPLICAS = (*OF_PROCESSES, "raise")
OF_LINKS = ("lost", "late", "twice", "swapped")

SHAPES = [
    Shape(num_replicas, own, on_failure)
    for num_replicas in (2, 3)
    for own in (False, True)
    for on_failure in ("rollback", "quarantine")
]
REFUSALS = [(), (Fault("replica 1", 0, "raise"),), (Fault("replica 1", 2, "raise"),)]


def kinds_of(actor: str) -> tuple[str, ...]:
    if actor.startswith("replica"):
        return OF_REPLICAS
    if actor == "registry":
        return ("raise",)
    return OF_PROCESSES if actor.startswith(("rank", "coordinator")) else OF_LINKS


def every_fault(shape: Shape, refusals: tuple[Fault, ...]) -> Iterator[Fault]:
    """A fault of every kind at every step that anybody takes when nothing else goes wrong."""
    world = World(shape, refusals)
    world.run()
    for actor, num_steps in sorted(world.clock.steps.items()):
        for step, kind in itertools.product(range(num_steps), kinds_of(actor)):
            yield Fault(actor, step, kind)


def play(shape: Shape, faults: tuple[Fault, ...], seed: int | None = None) -> World:
    world = World(shape, faults, seed)
    try:
        world.run()
        world.recover()
    except AssertionError as error:
        raise AssertionError(f"{error}\nin World({shape}, {faults}, {seed})") from error
    return world


def name(shape: Shape) -> str:
    ranks = "own ranks" if shape.ranks_of_their_own else "one rank"
    return f"{shape.num_replicas} replicas, {ranks}, {shape.on_failure}"


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_without_a_fault_everyone_is_published(shape: Shape) -> None:
    world = play(shape, ())
    assert world.report is not None
    assert world.report.outcome == "published"
    assert {replica.outcome for replica in world.report.replicas} == {"published"}


@pytest.mark.parametrize(
    "refusals", REFUSALS, ids=["all well", "one refuses", "one fails to apply"]
)
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_every_fault_at_every_step(shape: Shape, refusals: tuple[Fault, ...]) -> None:
    outcomes: Counter[str] = Counter()
    for fault in every_fault(shape, refusals):
        world = play(shape, (*refusals, fault))
        outcomes[world.report.outcome if world.report else "no report"] += 1
    print(name(shape), dict(outcomes))
    assert len(outcomes) > 1


@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_the_death_of_a_replica_is_noticed_at_once(shape: Shape) -> None:
    for fault in every_fault(shape, ()):
        if fault.actor == "replica 0" and fault.kind == "crash":
            assert play(shape, (fault,)).leader.ended_at < 1.0, fault


def test_random_schedules() -> None:
    """Any order of what may come in any order, and up to four faults anywhere."""
    print(f"SIMULATION_SEED={SEED} SIMULATION_SCHEDULES={NUM_SCHEDULES}")
    outcomes: Counter[str] = Counter()
    for number in range(NUM_SCHEDULES):
        seed = SEED + number
        rng = random.Random(seed)
        shape = rng.choice(SHAPES)
        faults = tuple(random_fault(rng, shape) for _ in range(rng.randint(0, 4)))
        world = play(shape, faults, seed)
        outcomes[world.report.outcome if world.report else "no report"] += 1
    print(dict(outcomes))
    assert outcomes["published"]


def random_fault(rng: random.Random, shape: Shape) -> Fault:
    replica, rank = rng.randrange(shape.num_replicas), rng.randrange(shape.num_ranks)
    actor = rng.choice(
        ["coordinator", "registry", "events", f"rank {rank}", f"decisions {rank}"]
        + [f"replica {replica}", f"up {replica}", f"down {replica}"] * 2
    )
    return Fault(actor, rng.randrange(12), rng.choice(kinds_of(actor)))
