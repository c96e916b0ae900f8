from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from tiny_replica import (
    TIMEOUT_SECONDS,
    Gate,
    StandInReplica,
    make_model,
    make_tokenizer,
    wait_until,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_engine.replica.engine import Engine
from checkpoint_engine.replica.server import create_app


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer()


@pytest.fixture(scope="session")
def old() -> PreTrainedModel:
    """The weights that every engine starts with; never served themselves."""
    return make_model(seed=1)


@pytest.fixture(scope="session")
def new() -> PreTrainedModel:
    return make_model(seed=2)


@pytest.fixture
def model(old: PreTrainedModel) -> PreTrainedModel:
    """The served model."""
    return copy.deepcopy(old)


@pytest.fixture
def gate(model: PreTrainedModel) -> Gate:
    return Gate(model)


@pytest.fixture
def engine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, gate: Gate
) -> Iterator[Engine]:
    """Started; it serves the version "old"."""
    engine = Engine(model, tokenizer, max_num_waiting=32)
    engine.set_version("old", "digest of old")
    engine.start()
    yield engine
    gate.open()
    engine.stop(TIMEOUT_SECONDS)


@pytest.fixture
def replica(engine: Engine, model: PreTrainedModel, new: PreTrainedModel) -> StandInReplica:
    replica = StandInReplica(engine, model)
    replica.sources["ipc:///new"] = new
    return replica


@pytest.fixture
def start_server() -> Iterator[Callable[[FastAPI], str]]:
    """Serves applications over real sockets, and returns their addresses."""
    running: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(app: FastAPI) -> str:
        config = uvicorn.Config(
            app, port=0, log_config=None, lifespan="off", ws="none", timeout_graceful_shutdown=10
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        wait_until(lambda: server.started)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield start
    for server, thread in running:
        server.should_exit = True
        thread.join(TIMEOUT_SECONDS)
        assert not thread.is_alive()


@pytest.fixture
def http(start_server: Callable[[FastAPI], str], replica: StandInReplica) -> Iterator[httpx.Client]:
    """A client of a replica that requires no token."""
    app = create_app(replica, token=None, model_name="tiny", device_uuid="GPU-test")
    with httpx.Client(base_url=start_server(app), timeout=TIMEOUT_SECONDS) as client:
        yield client
