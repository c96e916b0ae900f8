"""The code in docs/streaming.md does what is said there."""

from __future__ import annotations

import asyncio
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.streaming import names

DOCUMENT = (Path(__file__).parents[2] / "docs/streaming.md").read_text()


def test_the_example_streams_a_model(
    socket_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    trained, sampled = torch.nn.Linear(40, 30), torch.nn.Linear(40, 30)

    async def both() -> None:
        engine, metadata = found["make_trainer"]()
        await asyncio.gather(found["train"](engine, trained, 7), found["sample"](metadata, sampled))
        engine.finalize()

    asyncio.run(both())
    assert torch.equal(trained.weight, sampled.weight)
    assert "step-7" in capsys.readouterr().out


def test_the_example_syncs_samplers(
    socket_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, code = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    trainer = found["Trainer"](torch.nn.Linear(40, 30))
    samplers = [found["Sampler"](torch.nn.Linear(40, 30), threading.Lock()) for _ in range(2)]
    found["sync"](trainer, samplers, 7).close()
    for sampler in samplers:
        assert torch.equal(sampler.model.weight, trainer.model.weight)
    assert "['published', 'published']" in capsys.readouterr().out


def test_every_engine_is_described() -> None:
    for name, engine in names.BUILT_IN.items():
        assert f"`{engine}`" in DOCUMENT
        assert f"`{name}`" in DOCUMENT
    assert f"`{names.GROUP}`" in DOCUMENT
