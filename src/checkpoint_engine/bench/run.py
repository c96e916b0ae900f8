"""All rows of the benchmark, and one run of it.

result = run_bench(size="full", rounds=15, only=(), tell=print)
for row in result.rows:
    print(row.name, row.ratio, row.reached)
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from checkpoint_engine.bench.broadcast import measure_broadcast
from checkpoint_engine.bench.libraries import LIBRARIES, measure_library
from checkpoint_engine.bench.link import slow_link
from checkpoint_engine.bench.load import measure_load
from checkpoint_engine.bench.machine import Machine, Others
from checkpoint_engine.bench.measure import (
    Ratio,
    Row,
    Samples,
    Tell,
    Unavailable,
    against,
    needed,
    run_rounds,
)
from checkpoint_engine.bench.peers import measure_peers
from checkpoint_engine.bench.plan import measure_plan
from checkpoint_engine.bench.startup import measure_startup
from checkpoint_engine.bench.stream import measure_ray, measure_streams
from checkpoint_engine.bench.updates import Updates
from checkpoint_engine.bench.weights import SIZES, Size, save_checkpoint
from checkpoint_engine.errors import UsageError

__all__ = ["BROADCASTS", "UPDATES", "BenchResult", "run_bench"]

UPDATES = (
    Ratio("apply", "apply", "copy", 1.15),
    Ratio("pause", "pause", "copy", 1.6),
    Ratio("update", "update", "copy", 2.3),
    Ratio("rollback", "rollback", "pause", 1.2),
    Ratio("register", "register", "copy", 1.8),
    Ratio("files", "files", "update", 4.0, at_least=True),
    Ratio("trainer", "files", "register and update", 2.0, at_least=True),
    Ratio("join", "join", "copy"),
    Ratio("copy-control", "copy again", "copy"),
)
LOAD = ("p50-updates", "p99-updates", "tokens", "p50-staging", "p99-staging", "p99-uncapped")
BROADCASTS = (
    Ratio("broadcast", "broadcast", "bare", 1.2),
    Ratio("broadcast-control", "bare again", "bare"),
)
STREAMS = (
    Ratio("stream", "stream", "bare buckets", 1.2),
    Ratio("stream-packed", "stream", "bare bytes"),
    Ratio("stream-tensors", "tensor by tensor", "stream", 1.0, at_least=True),
    Ratio("stream-shm", "stream", "stream by shm", 1.0, at_least=True),
    Ratio("stream-slow", "stream to slow and fast", "stream to slow", 1.2),
)
RAY = (Ratio("stream-ray", "Ray object store", "stream beside Ray", 1.0, at_least=True),)
PEERS = (
    Ratio("p2p", "p2p", "bare p2p"),
    Ratio("p2p-4", "p2p from 4", "bare p2p from 4"),
)
STARTUPS = (Ratio("startup-2", "start-up of two ranks", "start-up of one", 0.75),)
PLANS = ("metas", "plan", "plan-memory")
LINKS = ("link-broadcast", "link-p2p")

LINE_BITS_PER_SECOND = 1e9
LINK_BYTES = 128 << 20
LINK_ROUNDS = 5
PLAN_BYTES = 500e6
WARMUPS = 4  # until the replica has its snapshot behind it, and a map of each pooled segment
BROADCAST_WARMUPS = 2
PEER_WARMUPS = 2
STARTUP_WARMUPS = 1
TMPFS = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it


Measure = Callable[[Size, int, Collection[Ratio], Tell], tuple[Samples, int]]
"""Measures what some ratios need, in so many rounds; also gives the bytes that were moved."""


class BenchResult(msgspec.Struct, frozen=True, kw_only=True):
    """One run.

    Attributes:
        size: of the model.
        others: how busy others kept the processors meanwhile, between 0 and 1.
        without: which rows this machine could not have, and why.
        seconds: the median of everything that was timed; "update/..." are an update's stages.
        samples: the seconds of every round.
    """

    machine: Machine
    size: str
    rounds: int
    others: float
    rows: tuple[Row, ...]
    without: tuple[str, ...]
    seconds: dict[str, float]
    samples: Samples


def run_bench(*, size: str, rounds: int, only: Collection[str], tell: Tell) -> BenchResult:
    """Measure the rows in `only`, or all of them.

    Args:
        size: one of `weights.SIZES`.
        rounds: how often everything is run and counted.
        only: their names.
        tell: called as the run proceeds.

    Raises:
        UsageError: there is no such size or row, or no room for a file of that size.
        CheckpointEngineError: an update or a broadcast failed.
    """
    _check(size, only)
    machine, others = Machine.this(), Others()
    rows: list[Row] = []
    samples: Samples = {}
    without: list[str] = []
    for ratios, measure in _groups():
        if not (chosen := _chosen(ratios, only)):
            continue
        with _leaving_out([ratio.name for ratio in chosen], without):
            measured, num_bytes = measure(SIZES[size], rounds, chosen, tell)
            rows += [ratio.row(measured, num_bytes) for ratio in chosen]
            samples |= measured
    for names, measure_rows in ((PLANS, _measure_plans), (LINKS, _measure_links)):
        if not only or set(names) & set(only):
            with _leaving_out(names, without):
                rows += [row for row in measure_rows(rounds, tell) if not only or row.name in only]
    if not only or set(LOAD) & set(only):
        measured_rows, measured = _measure_load(rounds, tell)
        rows += [row for row in measured_rows if not only or row.name in only]
        samples |= measured
    return BenchResult(
        machine=machine,
        size=size,
        rounds=rounds,
        others=others.share(),
        rows=tuple(rows),
        without=tuple(without),
        seconds={name: median(values) for name, values in samples.items()},
        samples=samples,
    )


def _groups() -> list[tuple[tuple[Ratio, ...], Measure]]:
    """Ratios that are measured together, and by what."""
    return [
        (UPDATES, _measure_updates),
        (BROADCASTS, _of_no_model(measure_broadcast, BROADCAST_WARMUPS)),
        (STREAMS, _of_no_model(measure_streams, BROADCAST_WARMUPS)),
        (RAY, _of_no_model(measure_ray, BROADCAST_WARMUPS)),
        (PEERS, _of_no_model(measure_peers, PEER_WARMUPS, from_peers=True)),
        *(
            (
                _library_ratios(library),
                _of_no_model(partial(measure_library, library), PEER_WARMUPS, from_peers=True),
            )
            for library in LIBRARIES
        ),
        (STARTUPS, _measure_startups),
    ]


def _library_ratios(library: str) -> tuple[Ratio, ...]:
    return (
        Ratio(f"p2p-{library}", f"p2p by {library}", f"bare {library}"),
        Ratio(f"p2p-{library}-4", f"p2p by {library} from 4", f"bare {library} from 4"),
    )


@contextmanager
def _leaving_out(names: Sequence[str], without: list[str]) -> Iterator[None]:
    """Go on without the rows that this machine cannot have."""
    try:
        yield
    except Unavailable as error:
        without.append(f"Without {', '.join(names)}: {' '.join(str(error).split())}.")


def _chosen(ratios: Collection[Ratio], only: Collection[str]) -> list[Ratio]:
    return [ratio for ratio in ratios if not only or ratio.name in only]


def _measure_updates(
    size: Size, rounds: int, ratios: Collection[Ratio], tell: Tell
) -> tuple[Samples, int]:
    with tempfile.TemporaryDirectory(prefix="ckpt-engine-bench-", dir=TMPFS) as folder:
        tell("making models", 0, 1)
        with Updates(size, Path(folder)) as updates:
            operations = needed(updates.operations(), ratios)
            samples = run_rounds(operations, rounds=rounds, warmups=WARMUPS, tell=tell)
            return samples, updates.num_bytes


def _of_no_model(
    measure: Callable[..., Samples], warmups: int, *, from_peers: bool = False
) -> Measure:
    """What moves bytes of no model."""

    def run(size: Size, rounds: int, ratios: Collection[Ratio], tell: Tell) -> tuple[Samples, int]:
        num_bytes = size.peer_bytes if from_peers else size.broadcast_bytes
        return measure(num_bytes, rounds=rounds, warmups=warmups, tell=tell), num_bytes

    return run


def _measure_startups(
    size: Size, rounds: int, ratios: Collection[Ratio], tell: Tell
) -> tuple[Samples, int]:
    with tempfile.TemporaryDirectory(prefix="ckpt-engine-bench-", dir=TMPFS) as folder:
        tell("making a checkpoint", 0, 1)
        file = Path(folder, "model.safetensors")
        num_bytes = save_checkpoint(size, file)
        samples = measure_startup(file, rounds=rounds, warmups=STARTUP_WARMUPS, tell=tell)
        return samples, num_bytes


def _measure_load(rounds: int, tell: Tell) -> tuple[list[Row], Samples]:
    """With the small size: a replica must answer a request in less time than an update takes."""
    with tempfile.TemporaryDirectory(prefix="ckpt-engine-bench-", dir=TMPFS) as folder:
        return measure_load(SIZES["small"], Path(folder), rounds=rounds, tell=tell)


def _measure_plans(rounds: int, tell: Tell) -> list[Row]:
    """A second and 500 MB are what a rank may take to plan for a very large fleet."""
    samples, used = measure_plan(rounds=rounds, tell=tell)
    memory = against("plan-memory", "memory", "500 MB", [float(used)], PLAN_BYTES, limit=1.0)
    return [
        against("metas", "metas", "one second", samples["metas"], 1.0),
        against("plan", "plan", "one second", samples["plan"], 1.0, limit=1.0),
        msgspec.structs.replace(memory, seconds=0.0, base_seconds=0.0),
    ]


def _measure_links(rounds: int, tell: Tell) -> list[Row]:
    """Rates through a link of one Gbit, where this machine lets one be made."""
    few, line = min(rounds, LINK_ROUNDS), 8 * LINK_BYTES / LINE_BITS_PER_SECOND
    reach: dict[str, Any] = {"limit": 0.9, "at_least": True, "num_bytes": LINK_BYTES}
    with slow_link(LINE_BITS_PER_SECOND) as far:
        broadcasts = measure_broadcast(LINK_BYTES, rounds=few, warmups=1, tell=tell, far=far)
        reads = measure_peers(LINK_BYTES, rounds=few, warmups=1, tell=tell, far=far)
    return [
        against("link-broadcast", "broadcast", "1 Gbit/s", broadcasts["broadcast"], line, **reach),
        against("link-p2p", "p2p", "1 Gbit/s", reads["p2p"], line, **reach),
    ]


def _check(size: str, only: Collection[str]) -> None:
    if size not in SIZES:
        raise UsageError(f"--size is {' or '.join(SIZES)}, not {size!r}")
    ratios = [ratio.name for group, _ in _groups() for ratio in group]
    known = [*ratios, *PLANS, *LINKS, *LOAD]
    unknown = sorted(set(only) - set(known))
    if unknown:
        raise UsageError(f"--only: there is no row {unknown[0]!r}; there are {', '.join(known)}")
    room = 2 * SIZES[size].file_bytes  # a file is saved beside the one that it replaces
    if not TMPFS.is_dir() or shutil.disk_usage(TMPFS).free < room:
        raise UsageError(f"{TMPFS}: files need {room / 1e9:.1f} GB there; a container: --shm-size")
