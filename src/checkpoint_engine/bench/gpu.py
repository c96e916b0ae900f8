"""Updates of 8 GB into an engine on a GPU, next to bare copies, MoonshotAI's package, and IPC.

Everything starts from a trainer's tensors in host memory, new in every round, and ends in the
parameters of an engine in another process; ours once more from tensors on the GPU. Each package has
a server and a worker of its own, and memory that is pooled before the clock starts. What is bare is
timed within one process, from memory that was pinned before; tensor by tensor, each goes to the GPU
and is handed over by CUDA IPC, while the next waits for it.

    python -m checkpoint_engine.bench.gpu --original FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import msgspec
import torch
import typer

from checkpoint_engine.bench.gpu_bare import Command, share
from checkpoint_engine.bench.gpu_weights import change, make_weights, sums
from checkpoint_engine.bench.machine import Machine
from checkpoint_engine.bench.measure import Operation, Ratio, Samples, Stopwatch, run_rounds
from checkpoint_engine.children import next_line
from checkpoint_engine.errors import CheckpointEngineError, PeerLost, VerificationError

__all__ = ["main"]

RATIOS = (
    Ratio("update", "ours: update", "pinned copy", 1.15),
    Ratio("blocked", "ours: blocked", "pinned copy", 1.15),
    Ratio("pause", "ours: pause", "pinned copy"),
    Ratio("original", "original: end to end", "ours: end to end", 1.5, at_least=True),
    Ratio("original-update", "original: update", "ours: update"),
    Ratio("from-gpu", "ours from the GPU: end to end", "ours: end to end"),
    Ratio("down", "ours from the GPU: register", "pinned copy"),
    Ratio("ipc", "tensor by tensor", "ours: end to end"),
    Ratio("pageable", "pageable copy", "pinned copy"),
    Ratio("control", "pinned copy again", "pinned copy"),
)
MASTER_PORTS = {"ours": 29611, "ours from the GPU": 29661, "original": 29711}
WARMUPS = 3  # until every pooled segment is pinned
START_SECONDS, ANSWER_SECONDS = 60.0, 60.0
HERE = Path(__file__).parent


class _Child:
    """A process that answers a line of JSON with another."""

    def __init__(self, command: list[str], who: str, environment: Mapping[str, str]) -> None:
        self._who = who
        self._process = subprocess.Popen(  # noqa: S603 - our own scripts
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
        )
        next_line(self._process, START_SECONDS, who)

    def ask(self, command: Any) -> Any:
        """Raises PeerLost with what it says of a failure."""
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        self._process.stdin.flush()
        answer = msgspec.json.decode(next_line(self._process, ANSWER_SECONDS, self._who))
        if isinstance(answer, dict) and "error" in answer:
            raise PeerLost(f"{self._who}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait(timeout=ANSWER_SECONDS)


class _Package:
    """One of the packages that do the job, with a trainer's tensors on the host or the GPU."""

    def __init__(self, name: str, path: str, num_layers: int, device: str) -> None:
        self._name = name
        environment = {
            "PYTHONPATH": os.pathsep.join([path, os.environ.get("PYTHONPATH", "")]),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOGURU_LEVEL": "WARNING",
            "NCCL_SOCKET_IFNAME": "lo",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(MASTER_PORTS[name]),
        }
        script = [str(HERE / "gpu_job.py"), "server", str(num_layers), device]
        self.child = _Child(["-P", *script], name, environment)

    def operation(self) -> Operation:
        """A whole update."""
        return Operation(frozenset(), self._round)

    def check(self) -> None:
        """Raise unless the engine has what the trainer has."""
        if not self.child.ask({"do": "check"}):
            raise VerificationError(f"{self._name}: the engine has other weights than the trainer")

    def say_used(self, when: str) -> None:
        """Print how much of the GPU is in use, by whomever."""
        used = self.child.ask({"do": "used_bytes"})
        print(f"{self._name}: {used / 1e9:.2f} GB of the GPU {when}", file=sys.stderr)  # noqa: T201

    def _round(self) -> Mapping[str, float]:
        seconds = self.child.ask({"do": "round"})
        line = ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
        print(f"  {self._name}: {line}", file=sys.stderr, flush=True)  # noqa: T201
        return {f"{self._name}: {name}": value for name, value in seconds.items()}


class _Bare:
    """Copies, and tensors by CUDA IPC."""

    def __init__(self, num_layers: int) -> None:
        self._weights = make_weights(num_layers, "cpu")
        self.child = _Child(
            ["-m", "checkpoint_engine.bench.gpu_bare", str(num_layers)], "bare copies", {}
        )

    @property
    def num_bytes(self) -> int:
        """Of all weights."""
        return sum(tensor.nbytes for tensor in self._weights.values())

    def copy(self, do: str, name: str) -> Operation:
        """One bare copy of everything."""
        return Operation(frozenset(), lambda: {name: self.child.ask(Command(do))})

    def tensors(self) -> Mapping[str, float]:
        """Each tensor to the GPU, handed over, and copied there before the next."""
        change(self._weights)
        watch = Stopwatch()
        with watch.time("tensor by tensor"):
            for name, tensor in self._weights.items():
                there = tensor.to("cuda")
                torch.cuda.synchronize()
                self.child.ask(Command("ipc", share(name, there)))
                del there
            self.child.ask(Command("end of ipc"))
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()
        return watch.seconds

    def check(self) -> None:
        """Raise unless the tensors arrived."""
        if self.child.ask(Command("sums")) != sums(self._weights):
            raise VerificationError("tensor by tensor: what arrived is not what was sent")


@contextmanager
def _attempt(what: str, without: list[str]) -> Iterator[None]:
    """Go on without what fails, and say so."""
    try:
        yield
    except (CheckpointEngineError, OSError, RuntimeError) as error:
        traceback.print_exc()
        without.append(f"without {what}: {type(error).__name__}: {error}")


def _measure(
    num_layers: int, rounds: int, original: Path | None, without: list[str]
) -> tuple[Samples, int]:
    operations: list[Operation] = []
    packages_made: list[_Package] = []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-engine-bench-"))
        os.environ["CKPT_ENGINE_STATE_DIR"] = folder
        bare = _Bare(num_layers)
        stack.callback(bare.child.close)
        operations.append(bare.copy("pinned", "pinned copy"))
        own = str(HERE.parents[1])
        packages = [("ours", own, "cpu"), ("ours from the GPU", own, "cuda")]
        if original is not None:
            packages.append(("original", str(original), "cpu"))
        for name, path, device in packages:
            with _attempt(name, without):
                start = time.perf_counter()
                package = _Package(name, path, num_layers, device)
                stack.callback(package.child.close)
                package.say_used("before the first update")
                first = package.operation().run()
                package.say_used("after the first update")
                package.check()
                print(  # noqa: T201
                    f"{name}: ready, updated once and right, {time.perf_counter() - start:.1f} s, "
                    f"of which {first[f'{name}: end to end']:.2f} s the first update",
                    file=sys.stderr,
                )
                operations.append(package.operation())
                packages_made.append(package)
        with _attempt("tensor by tensor", without):
            bare.tensors()
            bare.check()
            operations.append(Operation(frozenset(), bare.tensors))
        operations.append(bare.copy("pageable", "pageable copy"))
        operations.append(bare.copy("pinned", "pinned copy again"))
        samples = run_rounds(operations, rounds=rounds, warmups=WARMUPS, tell=_tell)
        for package in packages_made:
            package.say_used("after the last update")
            package.check()
        return samples, bare.num_bytes


def _tell(what: str, done: int, total: int) -> None:
    print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)  # noqa: T201


def main(
    layers: Annotated[int, typer.Option(help="0.44 GB each, and 1 GB on top.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 7,
    original: Annotated[Path | None, typer.Option(help="Where MoonshotAI's package is.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write samples as JSON.")] = None,
) -> None:
    """Measure updates into an engine on this machine's first GPU."""
    if not torch.cuda.is_available():
        print("no GPU on this machine: nothing is measured", file=sys.stderr)  # noqa: T201
        raise SystemExit(1)
    without: list[str] = [] if original else ["without original: --original was not given"]
    samples, num_bytes = _measure(layers, rounds, original, without)
    names = set(samples)
    rows = [ratio.row(samples, num_bytes) for ratio in RATIOS if {ratio.ours, ratio.base} <= names]
    lines = [f"{torch.cuda.get_device_name()}; {Machine.this()}", f"{num_bytes / 1e9:.2f} GB"]
    for row in rows:
        limit = "" if row.limit is None else f"{'>=' if row.at_least else '<='} {row.limit:g}"
        lines.append(
            f"{row.ours + ' / ' + row.base:45} {row.ratio:6.2f} {limit:8} "
            f"({row.lowest:.2f}-{row.highest:.2f})  {row.seconds:.3f} / {row.base_seconds:.3f} s"
        )
    lines += [f"{name:40} {median(values):.4f} s" for name, values in sorted(samples.items())]
    print("\n".join([*lines, *without]))  # noqa: T201
    if report is not None:
        report.write_text(json.dumps({"samples": samples, "bytes": num_bytes, "without": without}))


if __name__ == "__main__":
    typer.run(main)
