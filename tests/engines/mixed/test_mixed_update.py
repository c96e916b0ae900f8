"""One update of vLLM, SGLang and our replica: all of them have it, or none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_server import save_tensors, tensors_of
from mixed_servers import Fleet, update
from vllm_server import weights_of

pytestmark = pytest.mark.timeout(900)  # servers start

NORM = "model.layers.1.input_layernorm.weight"


def test_each_serves_what_a_fresh_start_would(fleet: Fleet, checkpoints: dict[str, Path]) -> None:
    assert fleet.shows("old", "old")
    ended = update(fleet.servers, checkpoints["new"], "step-1")
    assert (ended.code, ended.outcomes) == (0, ["published"] * 3), ended.said
    assert fleet.shows("new", "step-1")


def of_another_shape(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[:-1].clone()


def of_integers(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.int16)


@pytest.mark.parametrize("spoil", [of_another_shape, of_integers])
def test_if_one_refuses_all_stay_on_the_version_before(
    fleet: Fleet,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    spoil: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Our replica alone refuses integers, which vLLM and SGLang would cast."""
    folder = shutil.copytree(checkpoints["new"], tmp_path / "bad")
    tensors = tensors_of(folder)
    save_tensors(weights_of(folder), {**tensors, NORM: spoil(tensors[NORM])})
    ended = update(fleet.servers, folder, "bad")
    assert (ended.code != 0, ended.outcomes) == (True, ["kept"] * 3), ended.said
    assert NORM in ended.said
    if spoil is of_integers:
        assert ended.report["reason"]["where"] == "ours"
    assert fleet.shows("old", "old")
