"""The job that two packages of one import name do: from a trainer's tensors to an engine on a GPU.

A script, run once for each package with that on PYTHONPATH, so it knows only what both have. It is
the server with the trainer's tensors, and starts itself as the worker, in which an engine's loader
copies what it is given over its parameters. Both speak JSON, a line for each command and answer.

    PYTHONPATH=... python -P gpu_job.py server 16 cpu   # 16 layers, of a trainer on the host
    {"do": "round"}                                     # {"register": 0.7, "update": 0.2, ...}
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import zmq

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.worker import update_weights_from_ipc

WEIGHTS = Path(__file__).with_name("gpu_weights.py")


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu_weights = _load(WEIGHTS)


def _say(answer: object) -> None:
    _answers.write(json.dumps(answer) + "\n")
    _answers.flush()


class Worker:
    """An engine."""

    def __init__(self, num_layers: int) -> None:
        self._parameters = gpu_weights.make_weights(num_layers, "cuda")
        self._context = zmq.Context()

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        """Copy, as most loaders do in the end."""
        for name, tensor in named:
            self._parameters[name].copy_(tensor)

    def update(self, handle: str) -> dict[str, float]:
        """How long the engine was blocked."""
        start = time.perf_counter()
        update_weights_from_ipc(self._context, handle, 0, run=self.load_weights)
        torch.cuda.synchronize()
        return {"blocked": time.perf_counter() - start}

    def sums(self) -> dict[str, int]:
        """What tells versions apart."""
        found: dict[str, int] = gpu_weights.sums(self._parameters)
        return found

    def used_bytes(self) -> int:
        """Of the GPU, by all its processes, before anything is given back."""
        free, total = torch.cuda.mem_get_info()
        return total - free


class Server:
    """A trainer beside a parameter server of one rank."""

    def __init__(self, num_layers: int, device: str) -> None:
        self._weights = gpu_weights.make_weights(num_layers, device)
        self._worker = subprocess.Popen(  # noqa: S603 - this file, and a number
            [sys.executable, "-P", __file__, "worker", str(num_layers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._server = ParameterServer(auto_pg=False)
        self._server.init_process_group()
        self._is_original = not hasattr(self._server, "register_source")
        self._number = 0
        self._blocked = 0.0

    def round(self) -> dict[str, float]:
        """Seconds of one update, end to end."""
        gpu_weights.change(self._weights)
        torch.cuda.synchronize()
        self._number += 1
        name, times = f"step-{self._number}", [time.perf_counter()]
        self._server.register_checkpoint(
            name, named_tensors=self._weights, use_shared_memory_pool=True
        )
        times.append(time.perf_counter())
        self._server.gather_metas(name)
        times.append(time.perf_counter())
        # Ours waits a moment for more engines if it does not know that this is the only one.
        report = self._server.update(name, self._request if self._is_original else [self._request])
        times.append(time.perf_counter())
        if self._is_original:  # its pool is of one checkpoint
            self._server.unregister_checkpoint(name)
        register, gather, update = (end - start for start, end in itertools.pairwise(times))
        whole = time.perf_counter() - times[0]
        stages = dict(report.seconds) if report is not None else {}
        pause = {"pause": report.pause_seconds} if report is not None else {}
        return {
            "register": register,
            "gather": gather,
            "update": update,
            "blocked": self._blocked,
            "end to end": whole,
            **pause,
            **{f"update/{stage}": seconds for stage, seconds in stages.items()},
        }

    def check(self) -> bool:
        """Whether the engine has what the trainer has."""
        return bool(self._ask("sums") == gpu_weights.sums(self._weights))

    def used_bytes(self) -> int:
        """Of the GPU, as the worker sees it."""
        return int(self._ask("used_bytes"))

    def _request(self, handles: Any) -> None:
        ((_, handle),) = handles
        self._blocked = self._ask("update", handle=handle)["blocked"]

    def _ask(self, do: str, **arguments: str) -> Any:
        assert self._worker.stdin is not None
        assert self._worker.stdout is not None
        self._worker.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._worker.stdin.flush()
        answer = json.loads(self._worker.stdout.readline() or '{"error": "the worker died"}')
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["error"])
        return answer


def main(role: str, num_layers: str, device: str = "") -> None:
    """Answer commands until there are no more."""
    methods = Server(int(num_layers), device) if role == "server" else Worker(int(num_layers))
    if role == "server":
        _say("ready")
    for line in sys.stdin:
        command = json.loads(line)
        try:
            _say(getattr(methods, command.pop("do"))(**command))
        except Exception as error:
            _say({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print is no answer
    main(*sys.argv[1:])
