"""What is said of bad input, as JSON: the same with and without `python -O`."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable

import torch
from ps_tools import register, version

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.update.protocol import FromRank, Hello
from checkpoint_engine.worker import update_weights_from_ipc


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "no error"


def greeted(address: str) -> str:
    """What a worker hears that says hello to no update."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(address.removeprefix("ipc://"))
    channel: Channel[FromRank] = Channel(connection, FromRank)
    hello = Hello(protocol=1, replica="r", engine="e", rank=0, world_size=1)
    channel.send(hello)
    answer = channel.receive(10)
    channel.close()
    return f"{type(answer).__name__}: {getattr(answer, 'reason', '')}"


def main() -> None:
    server = ParameterServer()
    register(server, "good", 1)
    metas = server.get_metas()
    metas[0]["manifest"]["tensors"][0]["offset"] = 7
    weights = version(1)
    said = {
        "update before gather": error_of(lambda: server.update("other", print)),
        "no such policy": error_of(lambda: server.update("good", print, on_failure="hope")),
        "no replicas": error_of(lambda: server.update("good", print, min_replicas=0)),
        "registered twice": error_of(
            lambda: server.register_checkpoint("good", named_tensors=weights)
        ),
        "no tensor": error_of(
            lambda: server.register_checkpoint("bad", named_tensors={"w": [1.0]})
        ),
        "meta tensor": error_of(
            lambda: server.register_checkpoint(
                "bad", named_tensors={"w": torch.empty(2, device="meta")}
            )
        ),
        "unregistered": error_of(lambda: server.unregister_checkpoint("bad")),
        "hostile metas": error_of(lambda: server.load_metas(metas)),
        "rank": error_of(lambda: ParameterServer(rank=2, world_size=2)),
        "negative rank": error_of(lambda: ParameterServer(rank=-1, world_size=1)),
        "no master": error_of(lambda: ParameterServer(rank=0, world_size=2)),
        "abstract socket": error_of(
            lambda: update_weights_from_ipc(None, "ipc://@abstract", "cpu", run=print)
        ),
        "dead handle": error_of(
            lambda: update_weights_from_ipc(None, "ipc:///nowhere", "cpu", run=print)
        ),
        "no update": greeted(server.get_metas()[0]["address"]),
        "asserts": "on" if __debug__ else "off",
    }
    server.close()
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    os.environ.pop("RANK", None)
    main()
