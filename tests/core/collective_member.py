"""A member of a broadcast group in a process of its own, told what to do on its standard input.

    python collective_member.py <port of rank 0>

It answers each line, having done what it says: `connect <name>`, `send <number of bytes>`,
`receive <number of bytes>` (answers with the digest of what arrived), `abandon`, `die`; `go on`
receives 4 MiB again and again. After
`linger <name>` it is connected to this host, and goes on as if there were another to connect to.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from typing import Any

from checkpoint_engine.errors import TransferError
from checkpoint_engine.transport import collective as collective_module
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.transport.rendezvous import Rendezvous

TIMEOUT_SECONDS = 60.0


class Lingering(collective_module.ProcessGroupGloo):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        time.sleep(TIMEOUT_SECONDS)


def content(num_bytes: int) -> bytearray:
    return bytearray(hashlib.shake_128(b"weights").digest(num_bytes))


def obey(collective: Collective, command: str, argument: str) -> str:
    if command == "connect":
        collective.connect(argument, TIMEOUT_SECONDS)
    elif command == "linger":
        collective_module.ProcessGroupGloo = Lingering
        collective.connect(argument, TIMEOUT_SECONDS)
    elif command == "send":
        memory = memoryview(content(int(argument)))
        collective.broadcast(memory, root=1, timeout_seconds=TIMEOUT_SECONDS)
    elif command == "receive":
        memory = memoryview(bytearray(int(argument)))
        collective.broadcast(memory, root=0, timeout_seconds=TIMEOUT_SECONDS)
        return hashlib.sha256(memory).hexdigest()
    elif command == "go":
        memory = memoryview(bytearray(4 << 20))
        while True:
            collective.broadcast(memory, root=0, timeout_seconds=TIMEOUT_SECONDS)
    elif command == "abandon":
        collective.abandon()
    elif command == "die":
        os._exit(1)
    return "done"


def main(port: str) -> None:
    rendezvous = Rendezvous.of_environment(1, 2, "127.0.0.1", int(port))
    collective = Collective(rendezvous, index=1, size=2)
    print("ready", flush=True)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        try:
            answer = obey(collective, command, argument)
        except TransferError as error:
            answer = f"TransferError: {error}"
        print(answer, flush=True)
    rendezvous.close()  # rank 0 waits for that before it leaves


if __name__ == "__main__":
    main(*sys.argv[1:])
