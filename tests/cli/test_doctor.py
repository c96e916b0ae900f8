"""`ckpt-engine doctor`: each check on machines that lack what it looks for."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from checkpoint_engine.cli import doctor
from checkpoint_engine.cli.app import app

GIB = 1 << 30


@pytest.fixture
def socket_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "s"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(folder))
    return folder


def test_this_machine_can_do_what_the_tests_need(socket_folder: Path) -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    for name in ("Python", "torch", "gloo", "memfd sealing", "descriptor passing", "import name"):
        assert checks[name]["result"] == "ok", checks[name]
    assert checks["socket folder"]["found"] == str(socket_folder)
    assert all(check["remedy"] for check in checks.values() if check["result"] != "ok")


def test_a_failed_check_shows_its_remedy_and_fails(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    socket_folder.chmod(0o755)
    monkeypatch.setenv("RANK", "2")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    for text in ("socket folder", "CKPT_ENGINE_SOCKET_DIR", "RANK=2", "torchrun"):
        assert text in result.stdout


@pytest.mark.parametrize(
    ("version", "result"), [((3, 9, 2), "fail"), ((3, 10, 0), "ok"), ((3, 14, 0), "fail")]
)
def test_python(version: tuple[int, ...], result: str) -> None:
    assert doctor.check_python(version).result == result


def test_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8388608 kB\nMemFree: 1 kB\nMemAvailable:  4194304 kB\n")
    assert doctor.check_memory(meminfo).found == "4.0 GiB of 8.0 GiB available"
    meminfo.write_text("MemTotal:  8388608 kB\nMemAvailable:  1024 kB\n")
    assert doctor.check_memory(meminfo).result == "warn"


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    root, membership = tmp_path / "cgroup", tmp_path / "membership"
    pod, container = root / "pod", root / "pod" / "container"
    container.mkdir(parents=True)
    membership.write_text("0::/pod/container\n")
    assert doctor.check_control_group(root, membership).found == "no memory limit"

    (container / "memory.max").write_text("max\n")
    (pod / "memory.max").write_text(f"{8 * GIB}\n")
    (pod / "memory.current").write_text(f"{2 * GIB}\n")
    check = doctor.check_control_group(root, membership)
    assert (check.result, check.found) == ("ok", f"6.0 GiB of 8.0 GiB left in {pod}")

    (pod / "memory.current").write_text(f"{8 * GIB}\n")
    assert doctor.check_control_group(root, membership).result == "warn"


def test_a_control_group_of_version_1(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/docker/4711\n")
    folder = tmp_path / "memory"
    folder.mkdir()
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (folder / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    assert doctor.check_control_group(tmp_path, membership).found == "no memory limit"
    (folder / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    assert doctor.check_control_group(tmp_path, membership).found.startswith("3.0 GiB of 4.0 GiB")


def test_a_missing_shared_folder(tmp_path: Path) -> None:
    assert doctor.check_shared_folder(tmp_path / "shm").result == "warn"


@pytest.fixture
def tight_limits() -> Iterator[None]:
    kinds = (resource.RLIMIT_MEMLOCK, resource.RLIMIT_NOFILE)
    limits = [resource.getrlimit(kind) for kind in kinds]
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, limits[0][1]))
    # Enough for what other tests still hold.
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, limits[1][1]))
    yield
    for kind, limit in zip(kinds, limits, strict=True):
        resource.setrlimit(kind, limit)


@pytest.mark.usefixtures("tight_limits")
def test_limits_of_the_process(tmp_path: Path) -> None:
    assert doctor.check_open_files().result == "warn"
    assert doctor.check_locked_memory(tmp_path).result == "ok", "without RDMA nothing is locked"
    (tmp_path / "mlx5_0").mkdir()
    assert doctor.check_locked_memory(tmp_path).result == "warn"


@pytest.mark.parametrize(
    ("environ", "result"),
    [
        ({}, "ok"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "ok"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "fail"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "fail"),
        ({"RANK": "first", "WORLD_SIZE": "2"}, "fail"),
        ({"WORLD_SIZE": "2"}, "fail"),
    ],
)
def test_ranks(environ: dict[str, str], result: str) -> None:
    assert doctor.check_ranks(environ).result == result


def test_rendezvous() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        taken = doctor.check_master({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    assert taken.result == "warn"
    free = doctor.check_master({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
    assert (free.result, free.found) == ("ok", f"127.0.0.1:{port}, free on this host")
    elsewhere = doctor.check_master({"MASTER_ADDR": "192.0.2.1", "MASTER_PORT": port})
    assert (elsewhere.result, elsewhere.found) == ("ok", f"192.0.2.1:{port}, on another host")
    assert doctor.check_master({}).result == "ok"


@pytest.mark.parametrize(
    ("host", "port"),
    [(None, "29500"), ("127.0.0.1", None), ("127.0.0.1", "0"), ("host.invalid", "29500")],
)
def test_a_rendezvous_that_cannot_be(host: str | None, port: str | None) -> None:
    environ = {"MASTER_ADDR": host, "MASTER_PORT": port}
    given = {name: value for name, value in environ.items() if value is not None}
    assert doctor.check_master(given).result == "fail"


def test_another_distribution_with_our_import_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doctor.check_import_name().result == "ok"
    metadata = tmp_path / "checkpoint_engine-0.3.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: checkpoint-engine\nVersion: 0.3.0\n"
    )
    (metadata / "top_level.txt").write_text("checkpoint_engine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor.check_import_name()
    assert check.result == "fail"
    assert "pip uninstall checkpoint-engine" in check.remedy
