"""How long requests to vLLM and SGLang wait: for our update, and for the engine's own from disk.

A client asks a real server for short answers, one after the other, and notes when each token
arrives. Meanwhile the server is brought to the other of two checkpoints, by `ckpt-engine update`
or by what the engine has itself, or is left alone. The pause is the longest time in which no token
came, seen from outside, the same way for all of them. They take turns, so that whatever slows the
machine for a while slows them all.

vLLM's own way is `/collective_rpc` with `reload_weights`, and `/reset_prefix_cache`; SGLang's is
`/update_weights_from_disk`. Files are in the page cache, so no disk is measured. On two cores each
engine computes with one thread, which is what vLLM takes there by itself.

    scripts/bench-engines                           # both engines, 7 rounds: some 20 minutes
    scripts/bench-engines --engine vllm --rounds 3 --small
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from pathlib import Path
from statistics import median

import httpx
import psutil
import torch
from engine_server import EngineServer, environment, python_of
from safetensors.torch import save_file
from sglang_server import SGLangServer
from vllm_server import EXTENSION, VllmServer, completion

from checkpoint_engine.bench.machine import Machine, Others
from checkpoint_engine.bench.measure import Operation, Samples, run_rounds
from checkpoint_engine.bench.weights import SIZES, Size, make_model, save_folder
from checkpoint_engine.errors import AdapterError

NUM_TOKENS = 16  # of an answer: SGLang's own way waits for those that are under way
PROMPT = tuple(range(1, 33))
STD = 0.02
QUIET_SECONDS = 1.0  # before an update and after it
TIMEOUT_SECONDS = 300.0
WARMUPS = 2  # until each checkpoint was staged once
WAYS = ("alone", "own", "ours")


@dataclass(frozen=True)
class Kind:
    """One engine.

    Attributes:
        own: what its own update from disk is called.
        start: a server of a folder; takes Python, folder and log.
        ready: answers 200 when it serves.
        ask: path and body of a streamed request.
        reload: its own update of a server to a folder.
    """

    own: str
    start: Callable[[Path, Path, Path], EngineServer]
    ready: str
    ask: tuple[str, Mapping[str, object]]
    reload: Callable[[EngineServer, Path], None]


def _start_vllm(python: Path, folder: Path, log: Path) -> EngineServer:
    return VllmServer(python, folder, log, "--worker-extension-cls", EXTENSION)


def _start_sglang(python: Path, folder: Path, log: Path) -> EngineServer:
    return SGLangServer(python, folder, log)


def _reload_vllm(server: EngineServer, folder: Path) -> None:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    _post(server, "/collective_rpc", body)
    _post(server, "/reset_prefix_cache", None)


def _reload_sglang(server: EngineServer, folder: Path) -> None:
    body = {
        "model_path": str(folder),
        "load_format": "auto",
        "flush_cache": True,
        "weight_version": folder.name,
    }
    _post(server, "/update_weights_from_disk", body)


KINDS = {
    "vllm": Kind(
        own="reload_weights",
        start=_start_vllm,
        ready="/health",
        ask=("/v1/completions", {**completion(NUM_TOKENS, PROMPT), "stream": True}),
        reload=_reload_vllm,
    ),
    "sglang": Kind(
        own="update_weights_from_disk",
        start=_start_sglang,
        ready="/ready",
        ask=(
            "/generate",
            {
                "input_ids": list(PROMPT),
                "sampling_params": {
                    "temperature": 0.0,
                    "max_new_tokens": NUM_TOKENS,
                    "ignore_eos": True,
                },
                "stream": True,
            },
        ),
        reload=_reload_sglang,
    ),
}


def _post(server: EngineServer, path: str, body: object) -> None:
    answer = httpx.post(f"{server.url}{path}", json=body, timeout=TIMEOUT_SECONDS)
    if answer.is_error:
        raise AdapterError(f"{path} answered {answer.status_code}: {answer.text[:500]}")


class Client:
    """Asks for answers while the context lasts, and knows when tokens came."""

    def __init__(self, server: EngineServer, ask: tuple[str, Mapping[str, object]]) -> None:
        self._url, self._body = server.url + ask[0], ask[1]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.times: list[float] = []

    @property
    def longest(self) -> float:
        """Seconds between two tokens, at most."""
        return max(after - before for before, after in pairwise(self.times))

    def __enter__(self) -> Client:
        self._thread.start()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self._stop.set()
        if kind is None:  # a server whose update failed may never answer again
            self._thread.join(TIMEOUT_SECONDS)
            if self._error is not None:
                raise self._error

    def _run(self) -> None:
        try:
            with httpx.Client(timeout=TIMEOUT_SECONDS) as client:
                while not self._stop.is_set():
                    self._ask(client)
        except Exception as error:  # is raised where the context ends
            self._error = error

    def _ask(self, client: httpx.Client) -> None:
        with client.stream("POST", self._url, json=self._body) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    self.times.append(time.perf_counter())


def update_ours(server: EngineServer, folder: Path) -> None:
    """As a user would: a process of its own, which begins with importing everything."""
    command = [
        sys.executable, "-m", "checkpoint_engine", "update", "--endpoint", server.url,
        "--checkpoint-path", str(folder), "--weight-version", folder.name,
    ]  # fmt: skip
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS, env=environment()
    )


def measure(
    way: str, update: Callable[[], None], server: EngineServer, kind: Kind
) -> Mapping[str, float]:
    """The longest wait for a token, and how long the update took, under the way's name."""
    with Client(server, kind.ask) as client:
        time.sleep(QUIET_SECONDS)
        began = time.perf_counter()
        update()
        took = time.perf_counter() - began
        time.sleep(QUIET_SECONDS)
    return {way: client.longest, f"{way}/whole": took}


def operations(server: EngineServer, kind: Kind, folders: list[Path]) -> list[Operation]:
    """What a round consists of; every update is to the checkpoint that is not served."""
    turns = cycle([*folders[1:], folders[0]])
    updates: dict[str, Callable[[], None]] = {
        "alone": partial(time.sleep, 2 * QUIET_SECONDS),
        "own": lambda: kind.reload(server, next(turns)),
        "ours": lambda: update_ours(server, next(turns)),
    }
    return [
        Operation(frozenset({way}), partial(measure, way, updates[way], server, kind))
        for way in WAYS
    ]


def make_checkpoint(size: Size, folder: Path, seed: int) -> Path:
    """Of Qwen3-0.6B's shape, with weights that give finite activations."""
    model = make_model(size, seed)
    folder.mkdir()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(STD)
    save_folder(size, folder)
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@contextmanager
def serving(name: str, folder: Path, log: Path) -> Iterator[EngineServer]:
    """A server on a checkpoint, which ends with the context."""
    kind = KINDS[name]
    with kind.start(python_of(name), folder, log) as server:
        server.wait_for(kind.ready)
        yield server


def processor_seconds(server: EngineServer) -> float:
    """Of all its processes, so far."""
    process = psutil.Process(server.pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def run(name: str, folders: list[Path], rounds: int) -> tuple[Samples, float]:
    """The samples of one engine, and the share of the processors that others used meanwhile."""
    log = folders[0].parent / f"{name}.log"
    with serving(name, folders[0], log) as server:
        others, began, used = Others(), time.monotonic(), processor_seconds(server)
        samples = run_rounds(
            operations(server, KINDS[name], folders), rounds=rounds, warmups=WARMUPS, tell=tell
        )
        used = processor_seconds(server) - used
        ours = used / ((time.monotonic() - began) * (os.cpu_count() or 1))
        return samples, max(0.0, others.share() - ours)


def tell(what: str, done: int, total: int) -> None:
    """Say how far it is."""
    print(f"{what}: {done} of {total}, load {os.getloadavg()[0]:.1f}", file=sys.stderr)


def table(name: str, samples: Samples) -> str:
    """Medians and ranges, for a page."""
    titles = {
        "alone": "none",
        "own": f"its own, `{KINDS[name].own}`",
        "ours": "`ckpt-engine update`",
    }
    lines = ["| update | pause | rounds | whole |", "| --- | ---: | ---: | ---: |"]
    for way in WAYS:
        pauses, whole = samples[way], median(samples[f"{way}/whole"])
        lines.append(
            f"| {titles[way]} | {median(pauses):.2f} s | {min(pauses):.2f}-{max(pauses):.2f} "
            f"| {'' if way == 'alone' else f'{whole:.1f} s'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what the command line says, and print a table for each engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=list(KINDS), action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="0.16 GB: does it work here?")
    parser.add_argument("--report", type=Path, help="write the seconds of every round as JSON")
    options = parser.parse_args()
    measured: dict[str, Samples] = {}
    with tempfile.TemporaryDirectory(prefix="ckpt-engine-bench-") as root:
        os.environ["CKPT_ENGINE_STATE_DIR"] = f"{root}/state"  # no part of the user's history
        size = SIZES["small" if options.small else "full"]
        folders = [make_checkpoint(size, Path(root) / f"step-{n}", n) for n in range(2)]
        for name in options.engine or KINDS:
            samples, others = run(name, folders, options.rounds)
            measured[name] = samples
            print(f"\n{name}\n\n{table(name, samples)}\n")
            print(
                f"Medians of {options.rounds} rounds. {Machine.this()}. Meanwhile others used "
                f"{100 * others:.0f} % of the processors.",
                flush=True,
            )
    if options.report is not None:
        options.report.write_text(json.dumps(measured, indent=2))


if __name__ == "__main__":
    main()
