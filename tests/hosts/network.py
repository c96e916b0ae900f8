"""Hosts that are network namespaces of this machine, each with one link to a switch.

with Network(num_hosts=2) as network:
    network.hosts[0].inside             # the start of a command that is to run there
    network.hosts[1].down()             # its link is lost: no packet, and no reset
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

RATE = "100mbit"  # so that an update takes long enough to be met in its middle


def ip(*arguments: str) -> str:
    """Run `ip`; returns what it printed."""
    return run("ip", *arguments)


def run(*command: str) -> str:
    """Run a command; returns what it printed, or raises OSError with what it complained of."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextlib.contextmanager
def namespace(name: str) -> Iterator[str]:
    """A network namespace; whatever still runs in it at the end is killed."""
    ip("netns", "add", name)
    try:
        yield name
    finally:
        for pid in ip("netns", "pids", name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        ip("netns", "delete", name)


class Host:
    """One of them."""

    def __init__(self, number: int, network: Network) -> None:
        self.name, self.address = f"host {number}", f"10.77.0.{number + 1}"
        self._namespace = f"{network.name}-{number}"
        self._switch, self._port = network.switch, f"port{number}"
        network.enter_context(namespace(self._namespace))
        self.inside = ("ip", "netns", "exec", self._namespace)
        ip("link", "add", "eth0", "netns", self._namespace, "type", "veth",
           "peer", "name", self._port, "netns", self._switch)  # fmt: skip
        ip("-n", self._switch, "link", "set", self._port, "master", "bridge", "up")
        ip("-n", self._namespace, "address", "add", f"{self.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            ip("-n", self._namespace, "link", "set", device, "up")
        shaping = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", RATE]
        run(*self.inside, *shaping, "burst", "256kb", "latency", "400ms")

    def up(self) -> None:
        ip("-n", self._switch, "link", "set", self._port, "up")

    def down(self) -> None:
        """Pull the plug at the switch."""
        ip("-n", self._switch, "link", "set", self._port, "down")

    def kill(self) -> None:
        """Every process at once, as if the power had failed: nobody is told."""
        self.down()
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self._namespace).split()]

    @property
    def num_bytes_received(self) -> int:
        counted = ip(
            "netns", "exec", self._namespace, "cat", "/sys/class/net/eth0/statistics/rx_bytes"
        )
        return int(counted)

    @property
    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports at which anybody listens, of either family."""
        found = set()
        for family in ("tcp", "tcp6"):
            table = Path(f"/proc/{self.pids[0]}/net/{family}").read_text().splitlines()[1:]
            for fields in map(str.split, table):
                if fields[3] == "0A":
                    address, port = fields[1].split(":")
                    octets = bytes.fromhex(address)[:4][::-1]
                    found.add((".".join(map(str, octets)), int(port, 16)))
        return found


class Network(ExitStack):
    """Some hosts at one switch; gone at the end, with all that runs there.

    Raises:
        OSError: this machine does not allow namespaces, and why.
    """

    def __init__(self, num_hosts: int) -> None:
        super().__init__()
        self.name = f"ckpt-{os.getpid()}"
        try:
            self.switch = self.enter_context(namespace(f"{self.name}-switch"))
            ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
            ip("-n", self.switch, "link", "set", "bridge", "up")
            self.hosts = [Host(number, self) for number in range(num_hosts)]
        except BaseException:
            self.close()
            raise
