"""A storm: fault after fault, drawn by a seed, on three toy replicas and their trainer.

After each, what `Fleet.check` says must hold. A fault depends on the seed and its number alone, so
that each can be repeated by itself.

    scripts/storm --seed 7 --faults 200
    scripts/storm --seed 7 --only 143
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fleet import Fleet

NUM_REPLICAS = 3
TIMEOUT_SECONDS = 0.8

REPLICA_FAULTS = {
    "accept": ("refuse", "kill", "stop"),
    "prepare": ("raise", "kill", "stop", "hang", "exit"),
    "pause": ("raise", "kill", "stop", "hang"),
    "apply": ("raise", "kill", "stop", "hang", "exit"),
    "check": ("raise", "kill", "stop", "refuse"),
    "waiting": ("kill", "stop"),
    "publish": ("raise", "kill", "stop", "hang"),
    "resume": ("kill", "stop"),
}
TRAINER_FAULTS = {
    "opening": ("raise", "kill", "stop", "full disk"),
    "started": ("raise", "kill", "stop"),
    "staging": ("raise", "kill", "stop", "hang"),
    "applying": ("raise", "kill", "stop"),
    "deciding": ("raise", "kill", "stop", "hang", "full disk"),
    "decided": ("raise", "kill", "stop", "hang"),
    "telling": ("raise", "kill", "stop"),
}


@dataclass(frozen=True)
class Blow:
    """What goes wrong in one update: one or two faults, or a bit that flips."""

    faults: tuple[tuple[str, str, str], ...]
    flips_bit: bool
    policy: dict[str, Any]

    @classmethod
    def drawn(cls, seed: int, number: int) -> Blow:
        draw = random.Random(f"{seed}/{number}")
        who = draw.sample(["rank 0", *(f"replica {n}" for n in range(NUM_REPLICAS))], 2)
        policy: dict[str, Any] = {"on_failure": draw.choice(["rollback", "quarantine"])}
        if policy["on_failure"] == "quarantine":
            policy["min_replicas"] = draw.randint(1, NUM_REPLICAS)
        faults = []
        for name in who[: draw.choice([1, 1, 2])]:
            known = TRAINER_FAULTS if name == "rank 0" else REPLICA_FAULTS
            point = draw.choice(list(known))
            faults.append((name, point, draw.choice(known[point])))
        if who[0] != "rank 0" and draw.random() < 0.2:  # one that cannot go back is torn
            faults += [(who[0], "roll_back", "raise")]
        return cls(tuple(faults), draw.random() < 0.05, policy)

    def __str__(self) -> str:
        said = [f"{name}: {what} at {point}" for name, point, what in self.faults]
        said += ["a bit flips"] if self.flips_bit else []
        return f"{', '.join(said)} ({' '.join(map(str, self.policy.values()))})"


def strike(fleet: Fleet, blow: Blow) -> str:
    """One update with a blow, and what must hold afterwards; returns how the update ended."""
    fleet.recover()
    version = fleet.register()
    for fault in blow.faults:
        fleet.arm(*fault)
    if blow.flips_bit:
        fleet.trainer.call("flip", seed=version)
    outcome = fleet.finish(fleet.begin(version, timeout=TIMEOUT_SECONDS, **blow.policy))
    fleet.check()
    if outcome is None:
        return "the coordinator died"
    return ": ".join([outcome["outcome"], *(outcome["error"] or "").splitlines()[:1]])


def storm(fleet: Fleet, seed: int, numbers: Iterable[int]) -> None:
    """Blow after blow; says each before it comes."""
    for number in numbers:
        blow = Blow.drawn(seed, number)
        print(f"{number:4}  {blow}", end="", flush=True)
        try:
            print(f" → {strike(fleet, blow)}", flush=True)
        except BaseException:
            print(f"\nfailed; again: scripts/storm --seed {seed} --only {number}", flush=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--faults", type=int, default=200, help="how many")
    parser.add_argument("--only", type=int, help="this one alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    began = time.monotonic()
    numbers = range(options.faults) if options.only is None else [options.only]
    print(f"seed {options.seed}")
    fleet = Fleet(folder, num_replicas=NUM_REPLICAS)
    storm(fleet, options.seed, numbers)
    fleet.close()
    shutil.rmtree(folder)
    seconds = time.monotonic() - began
    print(f"{len(numbers)} faults in {seconds:.0f} s: every replica told the truth")


if __name__ == "__main__":
    sys.exit(main())
