"""What a machine is, in the words that explain its times, and who else was using it."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import msgspec
import torch

__all__ = ["Machine", "Others"]


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Where a benchmark ran. It is described, not named.

    Attributes:
        cpu: the model's name.
        num_cores: that this process may use.
        num_threads: with which torch copies.
    """

    cpu: str
    num_cores: int
    memory_bytes: int
    linux: str
    python: str
    torch: str
    num_threads: int

    @classmethod
    def this(cls) -> Machine:
        """The machine that this runs on."""
        return cls(
            cpu=_cpu_model(),
            num_cores=len(os.sched_getaffinity(0)),
            memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            linux=platform.release().partition("-")[0],
            python=platform.python_version(),
            torch=str(torch.__version__),
            num_threads=torch.get_num_threads(),
        )

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.num_cores} cores, {self.memory_bytes / 2**30:.0f} GiB, "
            f"Linux {self.linux}, Python {self.python}, torch {self.torch} with "
            f"{self.num_threads} threads"
        )


class Others:
    """How busy everybody else, other virtual machines included, keeps the processors from now on.

    Only children that have ended count as our own.
    """

    def __init__(self) -> None:
        self._began = _clocks()

    def share(self) -> float:
        """Between 0, a quiet machine, and 1."""
        elapsed, busy, own = (now - then for now, then in zip(_clocks(), self._began, strict=True))
        return max(0.0, busy - own) / (elapsed * (os.cpu_count() or 1))


def _clocks() -> tuple[float, float, float]:
    """Seconds: of the clock, of all processors when not idle, of this process and its children."""
    first_line = Path("/proc/stat").read_text().partition("\n")[0]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first_line.split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy, sum(os.times()[:4])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
