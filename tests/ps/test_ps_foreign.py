"""MoonshotAI's package at the other end: a REQ socket that serves, a REP socket that takes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import zmq
from ps_tools import EngineProcess, Handles, digests, register, version

from checkpoint_engine.errors import ForeignPeer, HandoverError, UpdateFailed
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.transport import sockets
from checkpoint_engine.worker import update_weights_from_ipc

Engines = tuple[EngineProcess, EngineProcess]


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    yield context
    context.destroy(linger=0)


def test_a_worker_names_the_server_that_it_cannot_understand(
    context: zmq.Context[zmq.Socket[bytes]], socket_folder: object
) -> None:
    address = f"ipc://{sockets.socket_dir()}/theirs"
    with context.socket(zmq.REQ) as theirs:
        theirs.bind(address)
        with pytest.raises(ForeignPeer, match=r"MoonshotAI.*use this package") as error:
            update_weights_from_ipc(None, address, "cpu", run=lambda named: None)
    assert f"process {os.getpid()} " in str(error.value)


def test_a_worker_names_whose_handle_it_was_given() -> None:
    with pytest.raises(HandoverError, match="MoonshotAI"):
        update_weights_from_ipc(
            None, "ipc://@checkpoint-engine-0.sock", "cpu", run=lambda named: None
        )


def test_an_update_names_the_engine_that_cannot_understand_it(
    server: ParameterServer, engines: Engines, context: zmq.Context[zmq.Socket[bytes]]
) -> None:
    register(server, "step-1", 1)
    server.update("step-1", engines[0].request())
    register(server, "step-2", 2)

    def theirs(handles: Handles) -> None:
        with context.socket(zmq.REP) as taker:
            taker.connect(handles[0][1])
            taker.poll(2000)  # theirs waits for ever

    with pytest.raises(UpdateFailed, match="MoonshotAI") as failure:
        server.update("step-2", [engines[0].request(), theirs])
    outcomes = {replica.name: replica.outcome for replica in failure.value.report.replicas}
    assert outcomes == {f"engine {engines[0].pid}": "kept", f"process {os.getpid()}": "lost"}
    assert engines[0].weights == digests(version(1))
