"""A rank in a process of its own; where to meet is in its environment, as torchrun puts it.

    python rendezvous_member.py

It gathers, meets barriers, appends to a log and reads it, as test_core_rendezvous.py does too,
prints what it gathered and read, and then stays, as rank 0's keys do, until its input ends.
"""

from __future__ import annotations

import hashlib
import sys

from checkpoint_engine.transport.rendezvous import Rendezvous

TIMEOUT_SECONDS = 60.0


def value_of(rank: int) -> bytes:
    """Larger than a value that torch's TCP store takes."""
    return bytes([rank]) * (9 << 20)


def take_part(rendezvous: Rendezvous) -> list[str]:
    """What every rank must see alike, as text."""
    seen = []
    for number in range(3):
        values = rendezvous.gather("metas", value_of(rendezvous.rank + number), TIMEOUT_SECONDS)
        seen += [hashlib.sha256(value).hexdigest() for value in values]
        rendezvous.barrier("same", TIMEOUT_SECONDS)
    fork = rendezvous.fork()
    log = fork.log("events")
    for number in range(20):
        log.append(f"{rendezvous.rank}.{number}".encode())
    seen += [log.next(TIMEOUT_SECONDS).decode() for _ in range(20 * rendezvous.world_size)]
    fork.give_back()
    rendezvous.barrier("same", TIMEOUT_SECONDS)
    return seen


def main() -> None:
    rendezvous = Rendezvous.of_environment()
    for line in take_part(rendezvous):
        print(line)
    print("end", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
