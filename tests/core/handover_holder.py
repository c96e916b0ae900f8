"""A receiver of store memory in a process of its own, told what to do on its standard input.

    python handover_holder.py <address> <segment>

It says "held <first byte>" when it has attached, and answers each line: `let_go`, `hold`, `write
<byte>` (into the first byte of its map), `close`. It ends with its input.
"""

from __future__ import annotations

import sys

from checkpoint_engine.transport.handover import Attachment


def main(address: str, segment: str) -> None:
    attachment = Attachment.open(address, segment)
    print("held", attachment.memory[0], flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "write":
            attachment.memory[0] = int(arguments[0])
        else:
            getattr(attachment, command)()
        print("done", attachment.memory[0] if command != "close" else "", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
