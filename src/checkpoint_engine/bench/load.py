"""Latency of requests to a replica: left alone, updated every second, and staged beside.

A replica process answers one request after the other over HTTP. A trainer process beside it does
one of four things meanwhile: nothing; an update every second; staging without end, on the idle
threads that staging has; or, as the control, the same copies and digests on common threads. They
take turns in every round, so that whatever slows the machine for a while slows them all.

    rows, samples = measure_load(SIZES["small"], folder, rounds=15, tell=print)
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles

import httpx
import msgspec
import numpy as np
import torch

from checkpoint_engine.bench.measure import Row, Samples, Tell
from checkpoint_engine.bench.replica import replica_process
from checkpoint_engine.bench.weights import Size, make_model, parameters, save_folder
from checkpoint_engine.calls import engine_requests
from checkpoint_engine.children import next_line, say
from checkpoint_engine.codec.digest import digest_pieces
from checkpoint_engine.errors import AdapterError
from checkpoint_engine.memory import byte_workers
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Store

__all__ = ["measure_load"]

CONDITIONS = ("alone", "updates", "staging", "uncapped")
REQUESTS_PER_ROUND = 20
WARMUP_REQUESTS = 10
NUM_TOKENS = 8
UPDATE_SECONDS = 1.0
TIMEOUT_SECONDS = 60.0


class _Job(msgspec.Struct, frozen=True):
    """What the trainer process is told on its command line."""

    num_layers: int
    vocab_size: int
    endpoint: str


class _Told(msgspec.Struct, frozen=True):
    """What the trainer process says when it has stopped: the pauses of its updates."""

    pauses: tuple[float, ...]


def measure_load(size: Size, folder: Path, *, rounds: int, tell: Tell) -> tuple[list[Row], Samples]:
    """Rows on the 50th and 99th percentile of a request's latency, and all latencies.

    Raises:
        AdapterError: a request failed.
        PeerLost: a process died.
    """
    save_folder(size, folder)
    latencies: Samples = {condition: [] for condition in CONDITIONS}
    pauses: list[float] = []
    with (
        replica_process(folder) as endpoint,
        _trainer(_Job(size.num_layers, size.vocab_size, endpoint)) as trainer,
        httpx.Client(base_url=endpoint, timeout=TIMEOUT_SECONDS) as client,
    ):
        _ask(client, WARMUP_REQUESTS)
        for number in range(rounds):
            for condition in CONDITIONS[:: -1 if number % 2 else 1]:
                tell(f"requests, {condition}", number, rounds)
                trainer.begin(condition)
                latencies[condition] += _ask(client, REQUESTS_PER_ROUND)
                pauses += trainer.end().pauses
    return _rows(latencies, pauses), {f"latency {k}": v for k, v in latencies.items()}


def _ask(client: httpx.Client, num_requests: int) -> list[float]:
    body = {"prompt": [1, 2, 3, 4], "max_tokens": NUM_TOKENS, "temperature": 0}
    seconds = []
    for _ in range(num_requests):
        start = time.perf_counter()
        response = client.post("/v1/completions", json=body)
        seconds.append(time.perf_counter() - start)
        if response.is_error:
            raise AdapterError(f"a request failed: {response.text[:500]}")
    return seconds


def _rows(latencies: Samples, pauses: Sequence[float]) -> list[Row]:
    alone, updated = latencies["alone"], latencies["updates"]
    staged, uncapped = latencies["staging"], latencies["uncapped"]
    token = median(alone) / NUM_TOKENS
    lost_per_update = max(0.0, sum(updated) - sum(alone)) / max(1, len(pauses))
    p50, p99 = median(alone), _p99(alone)
    excused = p99 + max(pauses, default=0.0) + token
    return [
        _row("p50-updates", "p50 updates", median(updated), "p50 alone", p50),
        _row("p99-updates", "p99 updates", _p99(updated), "p99 alone + pause + token", excused, 1),
        _row("tokens", "lost per update", lost_per_update, "a token", token),
        _row("p50-staging", "p50 staging", median(staged), "p50 alone", p50),
        _row("p99-staging", "p99 staging", _p99(staged), "p99 alone", p99, 1.3),
        _row("p99-uncapped", "p99 uncapped", _p99(uncapped), "p99 alone", p99),
    ]


def _row(
    name: str, ours: str, seconds: float, base: str, base_seconds: float, limit: float | None = None
) -> Row:
    """A ratio of percentiles over all rounds; single rounds are too short to have any."""
    ratio = seconds / base_seconds
    return Row(
        name=name,
        ours=ours,
        base=base,
        ratio=ratio,
        lowest=ratio,
        highest=ratio,
        limit=limit,
        at_least=False,
        seconds=seconds,
        base_seconds=base_seconds,
        num_bytes=0,
    )


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98]


# ── the trainer process ─────────────────────────────────────────────────────────────────────


class _Trainer:
    """The trainer process, as the process that asks sees it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def begin(self, condition: str) -> None:
        """Do this from now on."""
        self._say(condition)

    def end(self) -> _Told:
        """Stop, and tell."""
        self._say("stop")
        line = next_line(self._process, 2 * TIMEOUT_SECONDS, "the trainer process")
        return msgspec.json.decode(line, type=_Told)

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None, "its input is a pipe"
        self._process.stdin.write(f"{word}\n".encode())
        self._process.stdin.flush()


@contextmanager
def _trainer(job: _Job) -> Iterator[_Trainer]:
    process = subprocess.Popen(  # noqa: S603 - our own module, typed arguments
        [sys.executable, "-m", __name__, msgspec.json.encode(job).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        yield _Trainer(process)
    finally:
        process.kill()
        process.communicate()


class _Work:
    """What the trainer process does, each until it is told to stop."""

    def __init__(self, job: _Job) -> None:
        size = Size(job.num_layers, job.vocab_size, file_bytes=0, broadcast_bytes=0, peer_bytes=0)
        self._model = make_model(size, seed=0)
        self._server = ParameterServer(rank=0, world_size=1)
        self._store = Store()
        self._requests = engine_requests([job.endpoint], rank=0, world_size=1)
        self._copies = [torch.empty_like(parameter) for parameter in parameters(self._model)]
        self._number = 0

    def alone(self, stop: threading.Event) -> list[float]:
        """Nothing."""
        stop.wait(TIMEOUT_SECONDS)
        return []

    def updates(self, stop: threading.Event) -> list[float]:
        """An update every second; returns how long requests waited for each."""
        pauses = []
        while not stop.is_set():
            started = time.monotonic()
            label = self._next()
            self._server.register_checkpoint(
                label, named_tensors=dict(self._model.state_dict()), use_shared_memory_pool=True
            )
            self._server.gather_metas(label)
            pauses.append(self._server.update(label, self._requests).pause_seconds or 0.0)
            stop.wait(max(0.0, started + UPDATE_SECONDS - time.monotonic()))
        return pauses

    def staging(self, stop: threading.Event) -> list[float]:
        """Versions that nobody gets, one after the other."""
        while not stop.is_set():
            source = TensorSource(dict(self._model.state_dict()))
            self._store.register(self._next(), source, pooled=True)
        return []

    def uncapped(self, stop: threading.Event) -> list[float]:
        """As many copies and digests, on threads like any other."""

        def copy(pair: tuple[torch.Tensor, torch.Tensor]) -> None:
            target, source = (tensor.reshape(-1).view(torch.uint8).numpy() for tensor in pair)
            np.copyto(target, source)
            digest_pieces([target.data])

        with byte_workers() as pool:
            while not stop.is_set():
                list(pool.map(copy, zip(self._copies, parameters(self._model), strict=True)))
        return []

    def _next(self) -> str:
        self._number += 1
        return f"version-{self._number}"


def _main(argument: str) -> None:
    torch.set_num_threads(1)
    work = _Work(msgspec.json.decode(argument, type=_Job))
    with ThreadPoolExecutor(1) as thread:
        for line in sys.stdin:
            stop = threading.Event()
            doing = thread.submit(getattr(work, line.strip()), stop)
            sys.stdin.readline()
            stop.set()
            say(_Told(tuple(doing.result(TIMEOUT_SECONDS))))


if __name__ == "__main__":
    _main(sys.argv[1])
