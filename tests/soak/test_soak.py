"""Many updates of two replicas that answer requests all the while: nothing grows.

`make soak` runs 2,000 and draws docs/soak.svg; `make test-system` runs a few.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import psutil
import pytest
import torch
from e2e_model import make_folder
from safetensors.torch import load_file
from soak_curve import to_svg

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.demo.fleet import Fleet, Traffic
from checkpoint_engine.ps import ParameterServer

NUM_UPDATES = int(os.environ.get("SOAK_UPDATES", "40"))
PICTURE = os.environ.get("SOAK_PICTURE")
WARMUP_SHARE = 0.25
PROMPTS = [(5, 17, 250, 3), (1, 2, 3)]
MIB = 1 << 20

# By how much a quantity may grow: a factor, and something for short runs. Time is only looked at in
# long ones; a few updates are as noisy as the machine.
SLACK = {
    "memory, MiB": (1.02, 2),
    "descriptors": (1.0, 2),
    "threads": (1.0, 2),
    "maps of versions": (1.0, 1),
    "update, ms": (1.3, 0) if NUM_UPDATES >= 1000 else (1e9, 0),
}

Curves = dict[str, dict[str, list[float]]]


def measure(processes: dict[str, psutil.Process], curves: Curves) -> None:
    for name, process in processes.items():
        with process.oneshot():
            curves["memory, MiB"][name].append(process.memory_info().rss / MIB)
            curves["descriptors"][name].append(process.num_fds())
            curves["threads"][name].append(process.num_threads())
        maps = Path(f"/proc/{process.pid}/maps").read_text().count("memfd:ckpt-engine")
        curves["maps of versions"][name].append(maps)


@pytest.mark.timeout(3600)
def test_nothing_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(tmp_path / "s"))
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("CKPT_ENGINE_TOKEN", "soak")
    folder = make_folder(tmp_path / "model", seed=0)
    weights = load_file(folder / "model.safetensors")
    curves: Curves = defaultdict(lambda: defaultdict(list))
    server = ParameterServer(rank=0, world_size=1)
    try:
        with Fleet(folder, num_replicas=2, log_dir=tmp_path, token="soak") as fleet:
            requests = engine_requests(fleet.endpoints, rank=0, world_size=1)
            processes = {"trainer": psutil.Process()} | {
                f"replica {number}": psutil.Process(child.pid)
                for number, child in enumerate(fleet._children)
            }
            with Traffic(fleet, PROMPTS, num_tokens=8) as traffic:
                for number in range(NUM_UPDATES):
                    for tensor in weights.values():
                        tensor.neg_()
                    started = time.monotonic()
                    server.register_checkpoint(
                        f"v{number}", named_tensors=weights, use_shared_memory_pool=True
                    )
                    server.gather_metas(f"v{number}")
                    report = server.update(f"v{number}", requests)
                    curves["update, ms"]["trainer"].append(1e3 * (time.monotonic() - started))
                    assert report.verified
                    measure(processes, curves)
            assert traffic.failures == []
            assert traffic.num_answered > 0
    finally:
        server.close()
    if PICTURE is not None:
        title = f"{NUM_UPDATES} updates of two replicas under load"
        Path(PICTURE).write_text(to_svg(curves, title))
    check_flat(curves)


def check_flat(curves: Curves) -> None:
    """The last quarter is as the second: the first is for caches to fill and pools to grow."""
    grown = []
    for quantity, of_process in curves.items():
        for name, values in of_process.items():
            quarter = max(1, int(len(values) * WARMUP_SHARE))
            before, after = median(values[quarter : 2 * quarter]), median(values[-quarter:])
            print(f"{quantity:18} {name:10} {before:9.1f} -> {after:9.1f}")
            if after > before * SLACK[quantity][0] + SLACK[quantity][1]:
                grown.append((quantity, name, before, after))
    assert grown == []
