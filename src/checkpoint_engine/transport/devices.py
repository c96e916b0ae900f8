"""Which RDMA devices a rank uses: those that the environment names, shared out evenly.

`PS_P2P_STORE_RDMA_DEVICES` lists devices, as MoonshotAI's checkpoint-engine has it. Without it
`NCCL_IB_HCA` is understood as NCCL understands it: names are prefixes, `=` makes them exact, `^`
excludes, `:` adds a port; it is set on whole fleets, so a host without any device may ignore it.
Without both, whatever has an active port is used.

    devices = rdma_devices(os.environ)                  # ("mlx5_0", "mlx5_1")
    mine = devices_of_rank(devices, local_rank=5, num_local_ranks=8)       # ("mlx5_1",)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from checkpoint_engine.errors import UsageError

__all__ = ["devices_of_rank", "rdma_devices"]

FOLDER = Path("/sys/class/infiniband")
Ports = dict[str, dict[int, bool]]  # of each device, and whether they are active


def rdma_devices(environ: Mapping[str, str], folder: Path = FOLDER) -> tuple[str, ...]:
    """The devices that may be used, sorted by name; none where there are none.

    Raises:
        UsageError: the environment names one that is not there.
    """
    there = _ports(folder)
    if names := _listed(environ.get("PS_P2P_STORE_RDMA_DEVICES", "")):
        if missing := [name for name in names if name not in there]:
            raise UsageError(_not_there("PS_P2P_STORE_RDMA_DEVICES", missing, there))
        return tuple(sorted(set(names)))
    rule = environ.get("NCCL_IB_HCA", "").strip()
    if rule and there:
        return _by_rule(rule, there)
    return tuple(name for name, ports in there.items() if any(ports.values()))


def devices_of_rank(
    devices: Sequence[str], *, local_rank: int, num_local_ranks: int
) -> tuple[str, ...]:
    """The part of `devices` that one rank of a host uses: neighbours share, or take neighbours."""
    if not 0 <= local_rank < num_local_ranks:
        raise UsageError(f"local rank {local_rank} is not of {num_local_ranks} on this host")
    first = local_rank * len(devices) // num_local_ranks
    end = (local_rank + 1) * len(devices) // num_local_ranks
    return tuple(devices[first : max(end, first + 1)])


def _by_rule(rule: str, there: Ports) -> tuple[str, ...]:
    excludes, rule = rule.startswith("^"), rule.removeprefix("^")
    exact, rule = rule.startswith("="), rule.removeprefix("=")
    named: set[tuple[str, int]] = set()
    for entry in _listed(rule):
        name, _, port = entry.partition(":")
        found = {
            (device, number)
            for device, ports in there.items()
            for number in ports
            if (device == name if exact else device.startswith(name)) and port in ("", str(number))
        }
        if not found and not excludes:
            raise UsageError(_not_there("NCCL_IB_HCA", [entry], there))
        named |= found
    every = {(device, number) for device, ports in there.items() for number in ports}
    return tuple(sorted({device for device, _ in (every - named if excludes else named)}))


def _ports(folder: Path) -> Ports:
    if not folder.is_dir():
        return {}
    return {
        device.name: {
            int(port.name): "ACTIVE" in (port / "state").read_text()
            for port in sorted((device / "ports").iterdir())
        }
        for device in sorted(folder.iterdir())
    }


def _listed(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def _not_there(variable: str, missing: Sequence[str], there: Ports) -> str:
    return (
        f"{variable} names {', '.join(missing)}; this host has {', '.join(there) or 'no devices'}; "
        "`ibv_devices` lists them"
    )
