"""A key store in a process of its own, to be killed and stopped; it ends with its input.

python keystore_server.py <address> <port> <secret>     # prints the port
"""

from __future__ import annotations

import sys

from checkpoint_engine.transport.keystore import KeyServer
from checkpoint_engine.transport.secret import credentials


def main(address: str, port: str, secret: str) -> None:
    server = KeyServer(address, int(port), credentials(secret.encode()))
    print(server.port, flush=True)
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
