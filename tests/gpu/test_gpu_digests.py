"""Digests taken by a GPU are those that a manifest has; skipped where there is none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xxhash

from checkpoint_engine import cuda
from checkpoint_engine.codec.device_digest import DevicePlan, chunk_digests_there
from checkpoint_engine.codec.digest import chunk_digests
from checkpoint_engine.errors import DeadlineExceeded
from checkpoint_engine.manifest import CHUNK_BYTES, align

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

EDGES = (1, 16, 17, 128, 240, 241, 255, 256, 1023, 1024, 1025, 1088, 1089, 16 << 10)


def test_every_length_has_its_digest() -> None:
    generator = np.random.default_rng(0)
    lengths = [*EDGES, CHUNK_BYTES, CHUNK_BYTES - 1, *generator.integers(1, 50_000, 500).tolist()]
    starts = np.cumsum([0, *map(align, lengths)]).tolist()
    memory = generator.integers(0, 256, starts[-1], dtype=np.uint8)
    device = torch.device("cuda", 0)
    for _ in range(2):
        plan = DevicePlan.of(list(zip(starts[:-1], lengths, strict=True)), device)
        digests = plan.begin(torch.from_numpy(memory).to(device)).wait()
        for start, length, digest in zip(starts[:-1], lengths, digests, strict=True):
            assert digest == xxhash.xxh3_128_digest(memory[start : start + length]), length
        memory ^= 1  # another version, to which the same plan applies


@pytest.mark.parametrize("length", [0, 1, 240, 241, 250, 256, 300, 5 << 20, CHUNK_BYTES + 100])
def test_a_tensor_has_the_digests_of_its_chunks(length: int) -> None:
    data = torch.randint(256, (length,), dtype=torch.uint8)
    assert chunk_digests_there(data.to("cuda")) == chunk_digests(data.numpy().data)


def test_a_thread_that_has_done_nothing_else_takes_digests() -> None:
    data = torch.randint(256, (CHUNK_BYTES,), dtype=torch.uint8)
    there = data.to("cuda")
    assert chunk_digests_there(there) == chunk_digests(data.numpy().data)  # plans, and has memory
    with ThreadPoolExecutor() as pool:
        taken = pool.submit(chunk_digests_there, there).result(timeout=60)
    assert taken == chunk_digests(data.numpy().data)


def test_digests_behind_a_kernel_that_hangs_have_a_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device="cuda")
    plan = DevicePlan.of([(0, CHUNK_BYTES)], data.device)
    torch.cuda._sleep(4_000_000_000)  # about two seconds
    digests = plan.begin(data)
    monkeypatch.setattr(cuda, "WAIT_SECONDS", 0.05)
    with pytest.raises(DeadlineExceeded, match="a kernel hangs there"):
        digests.wait()
    monkeypatch.undo()
    assert b"".join(digests.wait()) == chunk_digests(data.cpu().numpy().data)
