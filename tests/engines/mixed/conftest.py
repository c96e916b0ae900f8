"""Real servers of three kinds at once. They take most of a minute to start, so tests share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from engine_server import python_of
from mixed_servers import KINDS, Fleet, Server, Tokens, launch, ready, tokens_of, update
from sglang_server import PROMPT
from transformers import AutoModelForCausalLM
from vllm_server import make_checkpoint

Launch = Callable[..., Server]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two versions of one model."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(root / name, seed=n) for n, name in enumerate(("old", "new"))}


@pytest.fixture(scope="session")
def launched(logs: Path) -> Launch:
    """Starts a server of a kind; the caller waits for it, and ends it."""
    pythons = {kind: python_of(kind) for kind in KINDS if kind != "replica"}

    def start(kind: str, folder: Path, held: Path | None = None) -> Server:
        log = logs / f"{len(list(logs.iterdir()))}-{kind}"
        return launch(kind, pythons.get(kind, Path()), folder, log, held)

    return start


@pytest.fixture(scope="session")
def shared_fleet(launched: Launch, checkpoints: dict[str, Path]) -> Iterator[Fleet]:
    """One server of each kind, which have been started on "old"."""
    fresh: dict[str, tuple[Tokens, ...]] = {}
    for name in ("new", "old"):
        with ExitStack() as stack:
            kinds = KINDS if name == "old" else KINDS[:2]  # what is not kept costs a start
            servers = [stack.enter_context(launched(kind, checkpoints[name])) for kind in kinds]
            for server in servers:
                ready(server)
            engines = tuple(tokens_of(server) for server in servers[:2])
            fresh[name] = (*engines, by_transformers(checkpoints[name]))
            if name == "old":
                yield Fleet(tuple(servers), fresh)


@pytest.fixture
def fleet(shared_fleet: Fleet, checkpoints: dict[str, Path]) -> Fleet:
    """It serves "old" under that label, whatever the test before has left."""
    ended = update(shared_fleet.servers, checkpoints["old"], "old")
    assert ended.code == 0, ended.said
    return shared_fleet


def by_transformers(folder: Path) -> Tokens:
    """Our replica's greedy tokens, from no server."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tokens = model.generate(torch.tensor([PROMPT]), max_new_tokens=16, do_sample=False)
    return tuple(tokens[0, len(PROMPT) :].tolist())
