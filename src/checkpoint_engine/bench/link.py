"""A link of a known rate on this machine: what moves through it is measured against its line rate.

A network namespace stands for another host. It is connected by a pair of virtual interfaces, and
what it sends is limited by the kernel's token bucket filter. That takes root, and a kernel that
has these; elsewhere the rows are left out, and say so.

    with slow_link(1e9) as far:
        subprocess.Popen([*far.command, sys.executable, ...])      # a process on the other host
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from checkpoint_engine.bench.measure import Unavailable

__all__ = ["FarHost", "slow_link"]

BURST_BYTES = 256 << 10
QUEUE_SECONDS = 0.05
COMMAND_SECONDS = 10.0


@dataclass(frozen=True)
class FarHost:
    """The other end.

    Attributes:
        command: what to put before a command that is to run there.
        address: at which it is reached.
        near_address: at which it reaches this host.
        interface, near_interface: names of the link's ends.
    """

    command: tuple[str, ...]
    address: str
    near_address: str
    interface: str
    near_interface: str


@contextmanager
def slow_link(bits_per_second: float) -> Iterator[FarHost]:
    """Connect another host by a link that carries so much from there to here.

    Raises:
        Unavailable: this machine does not allow it; says what it said.
    """
    name, number = f"ckpt{os.getpid()}", os.getpid() % 250
    far = FarHost(
        ("ip", "netns", "exec", name), f"10.213.{number}.2", f"10.213.{number}.1", "far", name
    )
    rate = f"{bits_per_second:.0f}bit"
    filtered = ["tbf", "rate", rate, "burst", str(BURST_BYTES), "latency", f"{QUEUE_SECONDS}s"]
    try:
        _run("ip", "netns", "add", name)
        _run(
            "ip", "link", "add", name, "type", "veth", "peer", "name", far.interface, "netns", name
        )
        _run("ip", "address", "add", f"{far.near_address}/30", "dev", name)
        _run("ip", "link", "set", name, "up")
        _run(*far.command, "ip", "address", "add", f"{far.address}/30", "dev", far.interface)
        _run(*far.command, "ip", "link", "set", far.interface, "up")
        _run(*far.command, "ip", "link", "set", "lo", "up")
        _run(*far.command, "tc", "qdisc", "add", "dev", far.interface, "root", *filtered)
        yield far
    finally:
        for command in (("ip", "link", "delete", name), ("ip", "netns", "delete", name)):
            subprocess.run(command, check=False, capture_output=True)  # noqa: S603


def _run(*command: str) -> None:
    try:
        subprocess.run(  # noqa: S603 - the kernel's own tools, arguments of ours
            command, check=True, capture_output=True, timeout=COMMAND_SECONDS
        )
    except subprocess.CalledProcessError as error:
        raise Unavailable(f"{_shown(command)}: {error.stderr.decode().strip()}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{_shown(command)}: {error}") from error


def _shown(command: Sequence[str]) -> str:
    return f"no link of a known rate can be made here: {' '.join(command)}"
