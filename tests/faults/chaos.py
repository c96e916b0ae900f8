"""Chaos: replicas die, start anew and are joined while their trainer updates them.

Two ranks on two hosts publish version after version to four toy replicas. Each replica has a keeper
that kills it and has it joined again, from a host of its own, in the middle of an update or not;
joiners and ranks die, too. Each has a client that asks without a pause. Every answer must be true
for the label that it carries, and who has been joined serves what was published last. In the end
everybody does, and nothing is left over.

    scripts/chaos --seed 7 --seconds 300

What happens is drawn by the seed; when, the machine decides.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from fleet import MOST_SEGMENTS, Fleet, Holdings
from toy import truth

from children import Child, wait_until

NUM_REPLICAS = 4
HOSTS = ("a", "b")
DISTURBED_SECONDS = 3.0  # of an update in which a rank dies
JOIN_SECONDS = 60.0
ASK_SECONDS = 0.002
RANK_POINTS = ("staging", "moving", "applying", "deciding", "decided", "telling")
JOINER_POINTS = ("reading", "reading", "reading", "applying", "deciding", "decided", "telling")
REPLICA_POINTS = ("prepare", "apply", "check", "waiting", "publish")


class Chaos:
    """Runs for some seconds on a fleet of two ranks; a thread for each who acts."""

    def __init__(self, fleet: Fleet, folder: Path, seed: int, seconds: float) -> None:
        self.counts: Counter[str] = Counter()
        self._fleet, self._folder, self._seed, self._seconds = fleet, folder, seed, seconds
        self._began = time.monotonic()
        self._over = threading.Event()
        self._updating = threading.Event()
        self._published = 0  # the last that reached everybody who was there
        self._generation = 0  # of ranks
        self._endangered = False  # whether one of them is about to die, or has died
        self._metas: dict[str, Any] | None = None
        truth(0)

    def run(self) -> None:
        """Until the time is up, or the first who sees something wrong."""
        with ThreadPoolExecutor(1 + 2 * NUM_REPLICAS) as pool:
            keepers = [pool.submit(self._until_over, self._keep, one) for one in self._names]
            clients = [pool.submit(self._until_over, self._ask, one) for one in self._names]
            trainer = pool.submit(self._until_over, self._publish)
            self._over.wait(self._seconds)
            wait(keepers)  # each has its replica joined at last, for which the trainer must live
            self._over.set()
            for acted in (*keepers, *clients, trainer):
                acted.result()
        self._check_end()

    @property
    def _names(self) -> list[str]:
        return list(self._fleet.addresses)

    @property
    def _is_time(self) -> bool:
        return self._over.is_set() or time.monotonic() > self._began + self._seconds

    def _until_over(self, act: Callable[..., None], *arguments: str) -> None:
        try:
            act(random.Random("/".join([str(self._seed), act.__name__, *arguments])), *arguments)
        except BaseException:
            self._over.set()
            raise

    def _say(self, what: str, *details: object) -> None:
        self.counts[what] += 1
        print(f"{time.monotonic() - self._began:7.2f}  {what}", *details, flush=True)

    # ── the trainer ─────────────────────────────────────────────────────────────────────────

    def _publish(self, draw: random.Random) -> None:
        """Version after version; now and then a rank dies, and the ranks start again."""
        while not self._over.is_set():
            version = self._fleet.register()
            disturbed = draw.random() < 0.1
            if disturbed:
                self._endangered = True
                rank, point = draw.randrange(len(HOSTS)), draw.choice(RANK_POINTS)
                self._fleet.arm(f"rank {rank}", point, "kill")
            self._update(version, disturbed)
            if disturbed:
                self._over.wait(0.5)  # joiners read from the rank that is left
                self._fleet.start_dead_ranks()
                self._metas, self._endangered = None, False
                self._generation += 1
            self._over.wait(draw.uniform(0.2, 1.5))

    def _update(self, version: int, disturbed: bool) -> None:
        named = {"timeout": DISTURBED_SECONDS} if disturbed else {}
        self._updating.set()
        numbers = self._fleet.begin(version, on_failure="quarantine", min_replicas=1, **named)
        outcome = None
        for rank, number in reversed([*zip(self._fleet.ranks, numbers, strict=True)]):
            try:
                outcome = rank.result(number)["outcome"]
            except RuntimeError as error:
                outcome = f"not ended: {str(error).splitlines()[0]}"
        self._updating.clear()
        if not disturbed:
            # All may have been joining, or have died before or while they changed.
            assert outcome in ("published", "aborted", "rolled_back"), outcome
            self._published = version if outcome == "published" else self._published
            self._metas = self._fleet.trainer.call("metas")
        self._say("a rank dies" if disturbed else f"a version is {outcome}", f"step-{version}")

    # ── a replica's keeper ──────────────────────────────────────────────────────────────────

    def _keep(self, draw: random.Random, name: str) -> None:
        """Kill it and have it joined, again and again; it is joined in the end."""
        while not self._is_time:
            self._fleet.replicas[name].kill()
            self._fleet.start_replica(name)
            self._say("a replica starts", name)
            generation = self._join_somehow(draw, name)
            self._over.wait(draw.uniform(0.2, 4.0))
            self._check_serves(name, self._published, generation, "after it was joined")

    def _join_somehow(self, draw: random.Random, name: str) -> int:
        """Try until it is joined; returns the generation of the ranks that it was joined to."""
        while not self._over.is_set():
            if draw.random() < 0.5:
                self._updating.wait(2.0)
            generation, metas = self._generation, self._metas
            if metas is None:
                self._over.wait(0.1)
                continue
            joiner = self._fleet.make_joiner(self._folder / name)
            try:
                if self._join(draw, name, joiner, generation, metas):
                    return generation
            finally:
                joiner.close()
        return -1

    def _join(
        self,
        draw: random.Random,
        name: str,
        joiner: Child,
        generation: int,
        metas: dict[str, Any],
    ) -> bool:
        replica = self._fleet.replicas[name]
        victim, points = draw.choice(
            [(None, ("",)), (None, ("",)), (joiner, JOINER_POINTS), (replica, REPLICA_POINTS)]
        )
        if victim is not None and not self._is_time:
            victim.call("arm", point=draw.choice(points), what="kill")
        published, in_update = self._published, self._updating.is_set()
        error = self._error_of_joining(name, joiner, metas)
        with suppress(RuntimeError):
            replica.call("recover")
        if has_died(replica):
            self._fleet.start_replica(name)
            self._say("a replica dies in its update", name)
        elif joiner.ended:
            self._say("a joiner dies", name)
        elif error is None:
            self._say("a replica is joined", name, "in an update" if in_update else "")
            self._check_serves(name, published, generation, "when it was joined")
            return True
        else:
            assert self._may_be_gone(generation), error
            self._say("a joiner finds no ranks", name)
        return False

    def _error_of_joining(self, name: str, joiner: Child, metas: dict[str, Any]) -> str | None:
        address = self._fleet.addresses[name]
        try:
            outcome = joiner.call("join", metas=metas, replicas=[address], timeout=JOIN_SECONDS)
        except RuntimeError as error:
            return str(error)
        found: str | None = outcome["error"]
        return found

    def _check_serves(self, name: str, published: int, generation: int, when: str) -> None:
        replica = self._fleet.replicas[name]
        try:
            answered = replica.call("ask")
        except RuntimeError:
            assert has_died(replica), f"{name} does not answer {when}"
            return
        if self._may_be_gone(generation):
            return  # an update that nobody has ended may have left it behind
        assert "refused" not in answered, f"{name} is {answered['refused']} {when}"
        served = int(answered["label"].removeprefix("step-"))
        assert served >= published, f"{name} serves step-{served} {when}: step-{published} is out"

    def _may_be_gone(self, generation: int) -> bool:
        """Whether the ranks of then, or one of them, may have died."""
        return self._endangered or generation != self._generation

    # ── a replica's client ──────────────────────────────────────────────────────────────────

    def _ask(self, draw: random.Random, name: str) -> None:
        """Without a pause, whatever happens to it."""
        while not self._over.wait(ASK_SECONDS):
            replica = self._fleet.replicas[name]
            try:
                answered = replica.call("ask")
            except (RuntimeError, ValueError, OSError) as error:
                wait_until(lambda one=replica: one.ended, f"the death that explains {error}")
                continue
            if "refused" in answered:
                self.counts[answered["refused"]] += 1
                continue
            seed = int(answered["label"].removeprefix("step-"))
            assert seed <= self._fleet.num_offered, f"{name} serves {answered['label']}"
            assert abs(answered["answer"] - truth(seed).answer) < 1e-3, f"{name} lies: {answered}"
            self.counts["true answers"] += 1

    # ── in the end ──────────────────────────────────────────────────────────────────────────

    def _check_end(self) -> None:
        """Everybody on one version; no descriptor, map, socket, file or lease is left."""
        fleet = self._fleet
        fleet.check()
        for rank in fleet.ranks:
            wait_until(lambda one=rank: one.call("num_readers") == 0, "the end of leases")
            assert Holdings(rank.pid).num_maps <= MOST_SEGMENTS
        for name in self._names:
            assert list((self._folder / name / "s").iterdir()) == []


def has_died(replica: Child) -> bool:
    """Whether it met the fault that was meant for it; nobody dies of anything else."""
    if replica.alive:
        return False
    replica.wait_for("fault")
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--seconds", type=float, default=300.0, help="how long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    print(f"seed {options.seed}")
    fleet = Fleet(folder, num_replicas=NUM_REPLICAS, hosts=HOSTS)
    chaos = Chaos(fleet, folder / "joiners", options.seed, options.seconds)
    try:
        chaos.run()
    finally:
        fleet.close()
        print(", ".join(f"{what}: {number}" for what, number in sorted(chaos.counts.items())))
    shutil.rmtree(folder)
    print(f"chaos for {options.seconds:.0f} s: every answer was true (seed {options.seed})")


if __name__ == "__main__":
    sys.exit(main())
