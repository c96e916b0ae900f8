"""Which RDMA devices a rank takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoint_engine.errors import UsageError
from checkpoint_engine.transport.devices import devices_of_rank, rdma_devices

PORTS = {
    "mlx5_0": {1: "4: ACTIVE"},
    "mlx5_1": {1: "4: ACTIVE", 2: "1: DOWN"},
    "mlx5_10": {1: "1: DOWN"},
    "bnxt_0": {1: "4: ACTIVE"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for device, ports in PORTS.items():
        for port, state in ports.items():
            (tmp_path / device / "ports" / str(port)).mkdir(parents=True)
            (tmp_path / device / "ports" / str(port) / "state").write_text(state + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("rule", "devices"),
    [
        ("mlx5", ("mlx5_0", "mlx5_1", "mlx5_10")),
        ("mlx5_1", ("mlx5_1", "mlx5_10")),
        ("=mlx5_1", ("mlx5_1",)),
        ("=mlx5_1,bnxt_0", ("bnxt_0", "mlx5_1")),
        ("mlx5_0, bnxt", ("bnxt_0", "mlx5_0")),
        ("mlx5:2", ("mlx5_1",)),
        ("=mlx5_0:1,mlx5_1:2", ("mlx5_0", "mlx5_1")),
        ("^mlx5", ("bnxt_0",)),
        ("^mlx5_1", ("bnxt_0", "mlx5_0")),
        ("^=mlx5_1", ("bnxt_0", "mlx5_0", "mlx5_10")),
        ("^=mlx5_1:2", ("bnxt_0", "mlx5_0", "mlx5_1", "mlx5_10")),
        ("^nothing", ("bnxt_0", "mlx5_0", "mlx5_1", "mlx5_10")),
    ],
)
def test_rules_are_those_of_nccl(folder: Path, rule: str, devices: tuple[str, ...]) -> None:
    assert rdma_devices({"NCCL_IB_HCA": rule}, folder) == devices


def test_a_list_comes_before_the_rule(folder: Path) -> None:
    environ = {"PS_P2P_STORE_RDMA_DEVICES": "mlx5_10, mlx5_0,mlx5_0", "NCCL_IB_HCA": "bnxt"}
    assert rdma_devices(environ, folder) == ("mlx5_0", "mlx5_10")


def test_without_either_those_that_are_connected(folder: Path) -> None:
    assert rdma_devices({}, folder) == ("bnxt_0", "mlx5_0", "mlx5_1")


@pytest.mark.parametrize(
    "environ",
    [
        {"PS_P2P_STORE_RDMA_DEVICES": "mlx5_0,mlx5_7"},
        {"NCCL_IB_HCA": "mlx5_7"},
        {"NCCL_IB_HCA": "=mlx5"},
        {"NCCL_IB_HCA": "mlx5_0:3"},
    ],
)
def test_what_is_not_there_is_named(folder: Path, environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=r"names mlx5.*this host has bnxt_0, mlx5_0"):
        rdma_devices(environ, folder)


def test_a_host_without_devices_ignores_what_is_set_for_the_fleet(tmp_path: Path) -> None:
    assert rdma_devices({"NCCL_IB_HCA": "mlx5"}, tmp_path / "infiniband") == ()
    with pytest.raises(UsageError, match="this host has no devices"):
        rdma_devices({"PS_P2P_STORE_RDMA_DEVICES": "mlx5_0"}, tmp_path / "infiniband")


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_devices_are_shared_out_evenly(num_devices: int, num_ranks: int) -> None:
    devices = tuple(f"mlx5_{number}" for number in range(num_devices))
    taken = [
        devices_of_rank(devices, local_rank=rank, num_local_ranks=num_ranks)
        for rank in range(num_ranks)
    ]
    assert {device for part in taken for device in part} == set(devices), "none is idle"
    num_users = [sum(device in part for part in taken) for device in devices]
    assert max(num_users) - min(num_users) <= 1
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


def test_no_devices_are_nobodys() -> None:
    assert devices_of_rank((), local_rank=3, num_local_ranks=4) == ()
    with pytest.raises(UsageError, match="local rank 4 is not of 4"):
        devices_of_rank(("mlx5_0",), local_rank=4, num_local_ranks=4)
