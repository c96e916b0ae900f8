"""Starts the processes of these tests in no time: what they import is imported once, here.

A process is forked and speaks through a socket of its own, which it connects to first.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from typing import Any, NoReturn

import torch
import toy_replica
import toy_trainer

from children import serve

MAINS = {"replica": toy_replica.main, "trainer": toy_trainer.main}


class Nursery:
    """The commands."""

    def fork(self, role: str, address: str, env: dict[str, str], arguments: dict[str, Any]) -> int:
        """The pid of a new process that speaks through the socket at `address`."""
        child = os.fork()
        if child == 0:
            self._live(role, address, env, arguments)
        return child

    def _live(
        self, role: str, address: str, env: dict[str, str], arguments: dict[str, Any]
    ) -> NoReturn:
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.environ.update(env)
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(address)
                os.dup2(connection.fileno(), 0)
                os.dup2(connection.fileno(), 1)
            sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
            MAINS[role](**arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    serve(Nursery())
