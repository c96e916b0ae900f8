"""`ckpt-engine diff` of checkpoints, whose numbers are those of torch over whole tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from checkpoint_engine.cli.app import app
from checkpoint_engine.manifest import CHUNK_BYTES

DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn),
    *(torch.int64, torch.uint8, torch.bool, torch.uint16),
]


def save(path: Path, **tensors: torch.Tensor) -> str:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path)
    return str(path)


def run(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["diff", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    return {**answer, "by_name": {tensor["name"]: tensor for tensor in answer["tensors"]}}


def test_what_became_of_each_tensor(tmp_path: Path) -> None:
    same = torch.randn(3, 5)
    before = dict.fromkeys(("same", "gone", "cast", "cut", "less", "more"), same)
    after = {"same": same, "new": same, "cast": same.bfloat16(), "cut": same[:2]}
    a = save(tmp_path / "a.safetensors", **before)
    b = save(tmp_path / "b.safetensors", **after, less=same * 1.01, more=same * 3)
    answer = run(a, b)
    kinds = {tensor["name"]: tensor["kind"] for tensor in answer["tensors"]}
    assert kinds == {
        "cast": "dtype",
        "cut": "shape",
        "gone": "only in A",
        "new": "only in B",
        "more": "changed",
        "less": "changed",
        "same": "equal",
    }
    assert list(kinds) == ["cast", "cut", "gone", "new", "more", "less", "same"], "most first"
    assert answer["by_name"]["cast"]["note"] == "F32 [3, 5] to BF16 [3, 5]"
    assert answer["counts"]["changed"] == 2
    assert run(a, a)["counts"] == {"equal": 6}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_are_those_of_whole_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    """Three chunks, the last a short one, with a change in each of the outer two."""
    num_elements = 2 * CHUNK_BYTES // dtype.itemsize + 1000
    old = torch.arange(num_elements).remainder(7).to(dtype)
    new = old.clone()
    new[5] = 0
    new[-1] = int(old[-1]) + 1
    a, b = (save(tmp_path / name, t=t) for name, t in [("a", old), ("b", new)])
    change = run(a, b)["by_name"]["t"]
    difference = new.to(torch.float64) - old.to(torch.float64)
    num_changed = int(difference.count_nonzero())
    assert num_changed == 2 or dtype is torch.bool
    assert change["changed_share"] == num_changed / num_elements
    assert change["max_difference"] == difference.abs().max().item()
    relative = difference.norm().item() / old.to(torch.float64).norm().item()
    assert change["relative_l2"] == pytest.approx(relative)


def test_numbers_that_are_none(tmp_path: Path) -> None:
    old = torch.tensor([float("inf"), 1.0, 0.0])
    a = save(tmp_path / "a", same_inf=old, nan=old, zero=torch.zeros(2), sign=torch.zeros(2))
    b = save(
        tmp_path / "b",
        same_inf=torch.tensor([float("inf"), 2.0, 0.0]),
        nan=torch.tensor([float("inf"), float("nan"), 0.0]),
        zero=torch.ones(2),
        sign=torch.tensor([-0.0, 0.0]),
    )
    found = run(a, b)["by_name"]
    assert found["same_inf"]["max_difference"] == 1.0
    assert found["nan"]["max_difference"] is None
    assert (found["zero"]["max_difference"], found["zero"]["relative_l2"]) == (1.0, None)
    assert found["sign"]["kind"] == "changed"
    assert (found["sign"]["changed_share"], found["sign"]["relative_l2"]) == (0.5, 0.0)


def test_values_without_arithmetic_are_equal_or_changed(tmp_path: Path) -> None:
    def write(name: str, data: bytes) -> str:
        entry = {"t": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}
        header = json.dumps(entry).encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + data)
        return str(tmp_path / name)

    a, b = write("a", b"abc"), write("b", b"abd")
    assert run(a, b)["by_name"]["t"]["kind"] == "changed"
    assert run(a, b)["by_name"]["t"]["changed_share"] is None
    assert run(a, a)["by_name"]["t"]["kind"] == "equal"


def test_the_table_has_what_changed_and_a_summary(tmp_path: Path) -> None:
    same = torch.ones(4)
    many = {f"t{number}": same for number in range(30)}
    a = save(tmp_path / "a", same=same, **many)
    b = save(tmp_path / "b", same=same, **{k: 2 * v for k, v in many.items()})
    runner = CliRunner(env={"COLUMNS": "120"})
    shown = runner.invoke(app, ["diff", a, b])
    assert shown.exit_code == 0
    assert "and 10 more; --all shows them" in shown.stdout
    assert "31 tensors: 30 changed, 1 equal" in shown.stdout
    assert "same " not in shown.stdout
    everything = runner.invoke(app, ["diff", a, b, "--all"]).stdout
    assert all(f"{name} " in everything for name in [*many, "same"])
    assert runner.invoke(app, ["diff", a, a]).stdout == "31 tensors: 31 equal\n"


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    a = save(tmp_path / "a", t=torch.ones(4))
    result = CliRunner().invoke(app, ["diff", a, str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert "there is no such file or folder" in result.stderr
