"""Engines whose parameters are on a GPU, in a process of their own; skipped where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import Child, spawn, wait_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

NUM_BYTES = 256 << 20
SLACK_BYTES = 32 << 20  # torch has segments of 2 and of 20 MB for small tensors


@pytest.fixture
def engine(socket_folder: Path) -> Iterator[Child]:
    with Child("gpu/gpu_engine.py", start=spawn) as child:
        yield child


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Where a trainer has them: more than one group, and what is hashed in its own way."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return {
        "large": torch.randn(NUM_BYTES // 2, generator=generator, device="cuda").bfloat16(),
        "odd": torch.randn(1_000_003, generator=generator, device="cuda").bfloat16(),
        "small": torch.tensor([float(seed)], device="cuda"),
        "empty": torch.empty(0, device="cuda"),
    }


def bring(
    server: ParameterServer, engine: Child, seed: int, *, device: str = "cuda", **behaviour: Any
) -> None:
    name = f"step-{seed}"
    named = {name: tensor.to(device) for name, tensor in weights(seed).items()}
    server.register_checkpoint(name, named_tensors=named, use_shared_memory_pool=True)
    update(server, engine, name, **behaviour)


def update(server: ParameterServer, engine: Child, name: str, **behaviour: Any) -> None:
    def request(handles: Any) -> None:
        engine.call("update", handle=dict(handles)[device_uuid()], **behaviour)

    server.gather_metas(name)
    server.update(name, [request])


def sums(seed: int) -> dict[str, float]:
    return {name: float(tensor.double().sum()) for name, tensor in weights(seed).items()}


def test_a_loader_on_the_gpu_is_brought_forward_and_back(
    lone_server: ParameterServer, engine: Child
) -> None:
    bring(lone_server, engine, 1)
    assert engine.call("sums") == sums(1)
    with pytest.raises(UpdateFailed, match="refused") as failure:
        bring(lone_server, engine, 2, failing=True)
    assert failure.value.report.outcome == "rolled_back"
    assert engine.call("sums") == sums(1)
    bring(lone_server, engine, 3)
    assert engine.call("sums") == sums(3)


def test_staged_bytes_are_pinned_for_the_gpu(lone_server: ParameterServer, engine: Child) -> None:
    bring(lone_server, engine, 1)
    bring(lone_server, engine, 2)
    assert engine.call("pinned") == ["", ""]


def test_files_in_memory_are_taken_over_and_pinned(
    lone_server: ParameterServer, engine: Child
) -> None:
    with TemporaryDirectory(prefix="ckpt-engine-test-", dir="/dev/shm") as folder:
        for seed in (1, 2):
            file = Path(folder, "model.safetensors")
            save_file(weights(seed), file)
            name = f"step-{seed}"
            lone_server.register_checkpoint(name, files=[file], use_inplace_pin_memory=True)
            assert not file.exists()
            update(lone_server, engine, name)
            assert engine.call("sums") == sums(seed)
    assert engine.call("pinned") == ["", ""]


def test_pinned_maps_go_when_their_memory_is_freed(
    lone_server: ParameterServer, engine: Child
) -> None:
    for seed in range(1, 5):
        bring(lone_server, engine, seed)
    assert engine.call("num_pinned_maps") > 0
    for label in lone_server._store.labels:
        lone_server.unregister_checkpoint(label, force=True)
    wait_until(lambda: engine.call("num_pinned_maps") == 0)


def test_a_gpu_without_room_refuses_while_it_serves(
    lone_server: ParameterServer, engine: Child
) -> None:
    bring(lone_server, engine, 1)
    engine.call("leave_free", num_bytes=NUM_BYTES // 2)
    with pytest.raises(UpdateFailed, match="cuda:0 has no room for the") as failure:
        bring(lone_server, engine, 2)
    report = failure.value.report
    assert (report.outcome, report.pause_seconds) == ("aborted", None)
    used = engine.call("used_bytes")
    assert used["torch"] < used["tensors"] + SLACK_BYTES, used
    engine.call("leave_free", num_bytes=8 * NUM_BYTES)
    bring(lone_server, engine, 3)
    assert engine.call("sums") == sums(3)


def test_what_may_not_be_pinned_goes_through_slots(
    lone_server: ParameterServer, engine: Child
) -> None:
    engine.call("forbid_pins")
    bring(lone_server, engine, 1)
    assert "the limit is 0" in engine.call("pinned")[0]
    assert engine.call("sums") == sums(1)


def test_bytes_that_changed_after_they_were_registered_reach_no_loader(
    lone_server: ParameterServer, engine: Child
) -> None:
    bring(lone_server, engine, 1)
    lone_server.register_checkpoint("bad", named_tensors=weights(2), use_shared_memory_pool=True)
    lone_server._store["bad"].segment.memory[NUM_BYTES - 1] ^= 1
    with pytest.raises(UpdateFailed, match="its bytes on cuda:0 are not those of the manifest"):
        update(lone_server, engine, "bad")
    assert engine.call("sums") == sums(1)


def test_a_version_is_streamed_from_files_to_the_gpu(
    lone_server: ParameterServer, engine: Child, tmp_path: Path
) -> None:
    save_file({name: one.cpu() for name, one in weights(1).items()}, tmp_path / "m.safetensors")
    lone_server.register_checkpoint("files", files=[tmp_path / "m.safetensors"], mode="streamed")
    update(lone_server, engine, "files")
    assert engine.call("sums") == sums(1)


def test_a_loader_may_keep_what_it_is_given(lone_server: ParameterServer, engine: Child) -> None:
    bring(lone_server, engine, 1, keeping=True)
    bring(lone_server, engine, 2)
    assert engine.call("sums", given=True) == sums(1)


def test_memory_of_the_gpu_is_given_back(lone_server: ParameterServer, engine: Child) -> None:
    used = []
    for seed in range(1, 6):
        bring(lone_server, engine, seed, device="cpu")
        torch.cuda.empty_cache()  # the trainer's share of what all processes use
        used.append(engine.call("used_bytes"))
    assert used[0]["tensors"] < NUM_BYTES + SLACK_BYTES, used
    for after in used:
        assert after["torch"] < after["tensors"] + SLACK_BYTES, used
        assert after["all"] - used[0]["all"] < SLACK_BYTES, used


def test_a_gpu_has_one_name_however_it_is_made_visible(socket_folder: Path) -> None:
    def name(visible: str) -> str:
        command = [sys.executable, str(Path(__file__).with_name("gpu_uuid.py"))]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return done.stdout.strip()

    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
    uuid = device_uuid()
    assert uuid in listed
    assert [name("0"), name(uuid), name(uuid[:12])] == [uuid] * 3
