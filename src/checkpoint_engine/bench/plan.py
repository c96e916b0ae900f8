"""What a rank of a very large fleet does before it reads: its metas, and its own plan.

A model with the shapes of Kimi-K2 (a trillion parameters, 70,882 tensors) is spread over 256 ranks,
and 256 others want it. One of those decodes and merges what all sources told, then plans which
bytes it reads from whom. No weights are needed for it, so it is done in full.

    samples, peak_bytes = measure_plan(rounds=15, tell=print)
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from checkpoint_engine.bench.measure import Operation, Samples, Stopwatch, Tell, run_rounds
from checkpoint_engine.errors import DeadlineExceeded, PeerLost
from checkpoint_engine.manifest import Manifest, TensorMeta, align, num_chunks
from checkpoint_engine.plan.routes import plan_routes
from checkpoint_engine.transport.peers import Peer
from checkpoint_engine.update.versions import RankMeta, Version, parts_on

__all__ = ["measure_plan"]

NUM_RANKS, RANKS_PER_HOST = 256, 8
NUM_LAYERS, NUM_EXPERTS, NUM_OTHERS = 61, 384, 10
EXPERT, OTHER = (2048, 7168), (1024, 7168)
RANK = 24  # any
TOTAL_SECONDS = 300.0


class _Result(msgspec.Struct, frozen=True):
    samples: Samples
    bytes_used: int


def measure_plan(*, rounds: int, tell: Tell) -> tuple[Samples, int]:
    """The seconds of "metas" and "plan" in every round, and the memory that both took.

    In a process of its own, since memory is measured.

    Raises:
        PeerLost: it died; its last words are in the message.
        DeadlineExceeded: it did not end.
    """
    tell("planning", 0, 1)
    try:
        process = subprocess.run(  # noqa: S603 - our own module, a number
            [sys.executable, "-m", __name__, str(rounds)],
            capture_output=True,
            timeout=TOTAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"no plan in {TOTAL_SECONDS:.0f} s") from error
    if process.returncode:
        raise PeerLost(f"the planner failed: {process.stderr.decode()[-2000:]}")
    result = msgspec.json.decode(process.stdout, type=_Result)
    tell("planning", 1, 1)
    return result.samples, result.bytes_used


def _encoded_metas() -> list[bytes]:
    """What the sources tell; each has every 256th tensor."""
    shapes = [
        (f"layers.{layer}.experts.{expert}.{name}.weight", "F8_E4M3", EXPERT, 1)
        for layer in range(NUM_LAYERS)
        for expert in range(NUM_EXPERTS)
        for name in ("gate_proj", "up_proj", "down_proj")
    ] + [
        (f"layers.{layer}.attention.{number}.weight", "BF16", OTHER, 2)
        for layer in range(NUM_LAYERS)
        for number in range(NUM_OTHERS)
    ]
    encoded = []
    for rank in range(NUM_RANKS):
        tensors, end = [], 0
        for name, dtype, shape, width in shapes[rank::NUM_RANKS]:
            length = shape[0] * shape[1] * width
            digests = os.urandom(16 * num_chunks(length))
            tensors.append(
                TensorMeta(
                    name=name, dtype=dtype, shape=shape, offset=end, length=length,
                    chunk_digests=digests,
                )
            )  # fmt: skip
            end = align(end + length)
        encoded.append(msgspec.msgpack.encode(_meta(rank, "source", Manifest.of(tensors))))
    return encoded


def _meta(rank: int, kind: str, manifest: Manifest) -> RankMeta:
    return RankMeta(
        rank=rank,
        host=f"{kind} host {rank // RANKS_PER_HOST}",
        address=f"ipc:///run/user/1000/ckpt-engine/{rank:032x}",
        device_uuid=f"GPU-{rank:032x}",
        segment=f"{rank:016x}" if manifest.tensors else "",
        manifest=manifest,
        peer=Peer(address=f"10.0.0.1:{4000 + rank}", key="k" * 40, ticket="t" * 64),
    )


def _operation(encoded: list[bytes]) -> Operation:
    receivers = [_meta(rank, "receiver", Manifest.of(())) for rank in range(NUM_RANKS)]
    names = [f"{rank:016x}" for rank in range(NUM_RANKS)]

    def run() -> dict[str, float]:
        watch = Stopwatch()
        with watch.time("metas"):
            metas = [msgspec.msgpack.decode(one, type=RankMeta) for one in encoded]
            gathered = Version.of(metas)
        with watch.time("plan"):
            version = gathered.read_by(receivers)
            mine = [bucket for _, bucket in version.buckets(version.share(RANK))]
            hosts = {source: meta.host for source, meta in enumerate(version.sources)}
            plan_routes(mine, version.held(), hosts=hosts, first=RANK)
            parts_on(version, version.hosts.of_rank[RANK], names)
        return watch.seconds

    return Operation(frozenset({"metas", "plan"}), run)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    )
    return int(line.split()[1]) * 1024


def _main(rounds: int) -> None:
    encoded = _encoded_metas()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident_bytes()
    samples = run_rounds(
        [_operation(encoded)], rounds=rounds, warmups=1, tell=lambda *progress: None
    )
    sys.stdout.buffer.write(msgspec.json.encode(_Result(samples, _peak_bytes() - before)))


if __name__ == "__main__":
    _main(int(sys.argv[1]))
