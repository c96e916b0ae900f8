"""Some seconds of chaos; `make chaos` is five minutes of it."""

from __future__ import annotations

from pathlib import Path

from chaos import HOSTS, NUM_REPLICAS, Chaos
from fleet import Fleet

SEED = 1
SECONDS = 10.0


def test_replicas_die_and_are_joined_while_their_trainer_updates_them(short_folder: Path) -> None:
    fleet = Fleet(short_folder, num_replicas=NUM_REPLICAS, hosts=HOSTS)
    chaos = Chaos(fleet, short_folder, SEED, SECONDS)
    chaos.run()
    fleet.close()
    assert chaos.counts["a replica is joined"] >= NUM_REPLICAS
    assert chaos.counts["a version is published"] >= 2
    assert chaos.counts["true answers"] >= 100
