"""Toy replicas, the parameter server that updates them, and what must hold whatever went wrong.

fleet = Fleet(folder, num_replicas=3)
fleet.replicas["replica 0"].call("arm", point="apply", what="kill")
outcomes = fleet.update(timeout=1.0)
fleet.check()                                   # true, served, mended, nothing left over
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from toy import Truth, label, truth

from children import Child, free_port, wait_until
from link import Link

SHORT_SECONDS = 0.5  # of an update in which a deadline is to pass
TIMEOUT_SECONDS = 30.0  # of an update that nothing disturbs: a slow machine may take its time
END_SECONDS = 10.0
TRAINER = "faults/toy_trainer.py"
SECRET = "of the ranks of this fleet"
MOST_SEGMENTS = 6  # two are retained, and each of three replicas may keep another version before


class Fleet:
    """Replicas are called in turn by the ranks, of which each has the host that is named for it."""

    def __init__(
        self,
        folder: Path,
        *,
        num_replicas: int,
        hosts: Sequence[str] = ("a",),
        streamed: bool = False,
    ) -> None:
        self.folder, self.hosts, self.streamed = folder, hosts, streamed
        self.sockets, self.state = folder / "s", folder / "state"
        self.addresses = {f"replica {n}": str(folder / f"r{n}") for n in range(num_replicas)}
        self._last_seed = 0
        self.replicas: dict[str, Child] = {}
        self.ranks: list[Child] = []
        self.link: Link | None = None  # from the other ranks to the first
        self.start_the_dead()

    @property
    def trainer(self) -> Child:
        """The coordinator's process."""
        return self.ranks[0]

    @property
    def newest(self) -> str:
        """The label of the version that was offered last."""
        return label(self._last_seed)

    @property
    def num_offered(self) -> int:
        """How many versions there are, besides what replicas start with."""
        return self._last_seed

    @property
    def offered(self) -> dict[str, Truth]:
        """Whatever a replica may truthfully serve, by its digest."""
        truths = [truth(seed) for seed in range(self._last_seed + 1)]
        return {one.digest: one for one in truths}

    def start_the_dead(self, **env: str) -> None:
        """Start what was killed, and nothing else."""
        for name in self.addresses:
            if name not in self.replicas or not self.replicas[name].alive:
                self.start_replica(name)
        self.start_dead_ranks(**env)

    def start_replica(self, name: str) -> None:
        """One that has died, or was never there, with the weights that replicas start with."""
        known, address = self.replicas.get(name), self.addresses[name]
        if known is not None:
            known.close()
        Path(address).unlink(missing_ok=True)
        self.replicas[name] = Child("faults/toy_replica.py", name, "0", address)
        wait_until(Path(address).exists)

    def start_dead_ranks(self, **env: str) -> None:
        """Ranks know each other: they start together."""
        if not self.ranks or not all(rank.alive for rank in self.ranks):
            for rank in self.ranks:
                rank.kill()
            self.ranks = self._start_ranks(env)

    def make_trainer(self, folder: Path) -> Child:
        """Another trainer of these replicas, with a record of its own."""
        return Child(
            TRAINER,
            CKPT_ENGINE_SOCKET_DIR=str(self.sockets),
            CKPT_ENGINE_STATE_DIR=str(folder),
        )

    def make_joiner(self, folder: Path) -> Child:
        """A server on a host of its own, from which some replicas are joined to the trainer's."""
        return Child(
            TRAINER,
            CKPT_ENGINE_HOST=str(folder),
            CKPT_ENGINE_SOCKET_DIR=str(folder / "s"),
            CKPT_ENGINE_STATE_DIR=str(folder / "state"),
        )

    def register(self) -> int:
        """A new version, on every rank; returns its seed."""
        self._last_seed += 1
        truth(self._last_seed)  # made before anybody can ask for it, and from another thread
        self.all("register", seed=self._last_seed, streamed=self.streamed)
        return self._last_seed

    def begin(self, seed: int, *, timeout: float = TIMEOUT_SECONDS, **options: Any) -> list[int]:
        """Let all ranks update their replicas; returns what `finish` waits for."""
        addresses = list(self.addresses.values())
        return [
            rank.send(
                "update",
                seed=seed,
                replicas=addresses[number :: len(self.ranks)],
                timeout=timeout,
                **options,
            )
            for number, rank in enumerate(self.ranks)
        ]

    def finish(self, numbers: Sequence[int]) -> dict[str, Any] | None:
        """The coordinator's outcome, None if it died; the others' are the same.

        One that stands still goes on when no replica waits for it any more.
        """
        while not self.trainer.has_answered(numbers[0]):
            if self.trainer.stopped:
                self.go_on(self.replicas.values())
                self.serving()
                self.go_on()
            time.sleep(0.005)
        outcome: dict[str, Any] | None = None
        for rank, number in zip(self.ranks, numbers, strict=True):
            try:
                result = rank.result(number)
            except RuntimeError as error:
                result = None if rank.ended else {"outcome": "failed", "error": str(error)}
            if rank is self.trainer:
                outcome = result
                self.go_on()  # what stands still must not hold up the other ranks for ever
        return outcome

    def update(self, **options: Any) -> dict[str, Any] | None:
        """A new version to all; returns the outcome, None if the coordinator died."""
        return self.finish(self.begin(self.register(), **options))

    def begin_by(self, rival: Child, replicas: Sequence[str] = ()) -> int:
        """Let another trainer register a version and update some replicas, or all."""
        self._last_seed += 1
        rival.call("register", seed=self._last_seed)
        addresses = [self.addresses[name] for name in replicas or self.addresses]
        arguments = {"seed": self._last_seed, "replicas": addresses, "timeout": TIMEOUT_SECONDS}
        return rival.send("update", **arguments)

    def update_by(self, rival: Child, replicas: Sequence[str] = ()) -> dict[str, Any]:
        outcome: dict[str, Any] = rival.result(self.begin_by(rival, replicas))
        return outcome

    def arm(self, name: str, point: str, what: str) -> None:
        """Let a replica, or "rank 0", meet a fault in the next update."""
        processes = {f"rank {number}": rank for number, rank in enumerate(self.ranks)}
        (processes | self.replicas)[name].call("arm", point=point, what=what)

    def all(self, do: str, **arguments: Any) -> None:
        numbers = [rank.send(do, **arguments) for rank in self.ranks]
        for rank, number in zip(self.ranks, numbers, strict=True):
            rank.result(number)

    # ── what must hold ──────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """See the issue: after any fault whatsoever.

        Every live replica serves exactly one version, names it truthfully and answers; the next
        update reaches all without a restart of anything but what was killed; nothing is left over.
        """
        self.go_on()
        self.serving()
        self.start_the_dead()
        self.recover()
        before = {name: replica.pid for name, replica in self.replicas.items()}
        for _ in range(2):  # the second lets go of what the first went on holding as its way back
            outcome = self.update()
            assert outcome is not None
            assert (outcome["outcome"], outcome["error"]) == ("published", None)
            assert set(self.serving().values()) == {self.newest}
        assert before == {name: replica.pid for name, replica in self.replicas.items()}
        self._check_nothing_left()

    def go_on(self, processes: Iterable[Child] = ()) -> None:
        """Whoever was stopped goes on, and the link is up, now that deadlines have passed."""
        if self.link is not None:
            self.link.up()
        for process in processes or [*self.ranks, *self.replicas.values()]:
            if process.stopped:
                process.signal(signal.SIGCONT)

    def recover(self) -> None:
        """Faults that were not met are forgotten, and limits lifted."""
        for process in [*self.ranks, *self.replicas.values()]:
            process.call("recover")
            process.forget()

    def serving(self) -> dict[str, str]:
        """The label of each live replica that serves, after its truth was checked.

        One that says that it is torn is of no version, and does not serve.
        """
        labels = {}
        for name, replica in self.replicas.items():
            try:
                label = self._served(name, replica) if replica.alive else None
            except RuntimeError:
                if not replica.ended:
                    raise
                continue  # it has died meanwhile
            if label is not None:
                labels[name] = label
        return labels

    def _served(self, name: str, replica: Child) -> str | None:
        info = self._settled(replica)
        if info["state"] == "torn":
            assert info["base"] is None
            assert self._ask(replica, "ask") == {"refused": "torn"}
            return None
        assert info["digest"] in self.offered, f"{name} serves a mixture"
        said = self.offered[info["digest"]]
        assert info["label"] == said.label, f"{name} lies about its version"
        assert info["digest"] == info["base"]
        if info["state"] == "quarantined":
            assert self._ask(replica, "ask") == {"refused": "quarantined"}
            return None
        assert info["state"] == "serving"
        self._check_answer(replica, said)
        return said.label

    def _settled(self, replica: Child) -> dict[str, Any]:
        """What it says of itself, once no update is under way there."""
        infos: list[dict[str, Any]] = []

        def is_settled() -> bool:
            infos.append(self._ask(replica, "info"))
            return infos[-1]["state"] != "updating"

        wait_until(is_settled, "an update's end")
        return infos[-1]

    def _ask(self, replica: Child, do: str) -> Any:
        """What it answers, even if a fault stops it at this moment."""
        number = replica.send(do)

        def has_answered() -> bool:
            self.go_on([replica])
            return replica.has_answered(number)

        wait_until(has_answered, "its answer")
        return replica.result(number)

    def _check_answer(self, replica: Child, said: Truth) -> None:
        answered = self._ask(replica, "ask")
        assert answered["label"] == said.label
        assert abs(answered["answer"] - said.answer) < 1e-3, "another version's weights answer"

    def _check_nothing_left(self) -> None:
        """Descriptors and maps of each process, files, sockets and processes."""
        assert {path.name for path in self.state.iterdir()} <= {
            "registry.sqlite", "registry.sqlite-wal", "registry.sqlite-shm"
        }  # fmt: skip
        wait_until(
            lambda: len(os.listdir(self.sockets)) == len(self.ranks), "the end of dead sockets"
        )
        for process in [*self.ranks, *self.replicas.values()]:
            assert Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text() == ""
        deadline = time.monotonic() + END_SECONDS
        while found := self.leftovers():
            assert time.monotonic() < deadline, "; ".join(found)
            time.sleep(0.005)

    def leftovers(self) -> list[str]:
        """What a process holds and has no reason to."""
        replicas = {name: Holdings(replica.pid) for name, replica in self.replicas.items()}
        found = [
            f"{name} holds {held}"
            for name, held in replicas.items()
            # Its listener, and the lease of each map, which has a descriptor.
            if held.num_sockets != 1 + held.num_maps
            or held.num_memories != held.num_maps
            or held.num_files > 2  # of the version that is served, and of the one before
        ]
        if len(self.ranks) == 1:
            held = Holdings(self.trainer.pid)
            num_leases = sum(replica.num_maps for replica in replicas.values())
            # Its door, the port where peers ask, that where they read if they ever did,
            # and the other end of each lease; two descriptors a segment.
            num_own = held.num_sockets - num_leases
            if num_own not in (2, 3) or held.num_memories != 2 * held.num_maps:
                found.append(f"the trainer holds {held} for {num_leases} leases")
            if held.num_maps > MOST_SEGMENTS or held.num_files > 1:
                found.append(f"the trainer holds {held}")
        return found

    def close(self) -> None:
        self.go_on()
        for process in [*self.ranks, *self.replicas.values()]:
            process.close()
        if self.link is not None:
            self.link.close()

    def _start_ranks(self, env: dict[str, str]) -> list[Child]:
        env = {
            "CKPT_ENGINE_SOCKET_DIR": str(self.sockets),
            "CKPT_ENGINE_STATE_DIR": str(self.state),
            **env,
        }
        if len(self.hosts) == 1:
            return [Child(TRAINER, **env)]
        port = free_port()
        if self.link is not None:
            self.link.close()
        self.link = Link(port)
        ranks = []
        for rank, host in enumerate(self.hosts):
            reached_at = self.link.port if rank else port
            env |= {"RANK": str(rank), "WORLD_SIZE": str(len(self.hosts)), "CKPT_ENGINE_HOST": host}
            # A rank keeps to the port after the trainer's own.
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reached_at - 1)}
            env |= {"CKPT_ENGINE_SECRET": SECRET}
            ranks.append(Child(TRAINER, **env))
        return ranks


class Holdings:
    """What a process holds, as the kernel tells it."""

    def __init__(self, pid: int) -> None:
        links = []
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links.append(os.readlink(descriptor))
            except FileNotFoundError:
                continue  # closed meanwhile
        maps = Path(f"/proc/{pid}/maps").read_text()
        self.num_sockets = len({link for link in links if link.startswith("socket:")})
        self.num_memories = len([link for link in links if "memfd:ckpt-engine" in link])
        self.num_files = len([link for link in links if ".safetensors" in link])
        self.num_maps = len(set(re.findall(r" (\d+) +/memfd:ckpt-engine", maps)))

    def __repr__(self) -> str:
        memory = f"{self.num_memories} memfds, {self.num_maps} maps"
        return f"{self.num_sockets} sockets, {self.num_files} files, {memory}"
