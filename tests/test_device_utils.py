"""Devices and their names, on this CPU machine and with stand-ins for an NPU's tools."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from checkpoint_engine import device_utils
from checkpoint_engine.device_utils import (
    DeviceManager,
    device_uuid,
    get_ip,
    npu_generate_uuid,
    same_stream,
)
from checkpoint_engine.errors import UsageError

# What npu-smi prints for `info -t proc-mem -i 0` on a card with two chips.
TWO_CHIPS = """\
        NPU ID                         : {npu}
        Chip Count                     : 2

        {first}
        Chip ID                        : 0

        {second}
        Chip ID                        : 1
"""
IDLE = "No process in device."


def process(pid: int) -> str:
    return f"Process id:{pid} Process name:python3          Process memory(MB):48208"


@pytest.fixture
def fake_npu_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An npu-smi that prints the file named by the NPU's id, and fails where there is none."""
    tool = tmp_path / "npu-smi"
    tool.write_text(
        f'#!/bin/sh\n[ "$*" = "info -t proc-mem -i $5" ] || exit 64\nexec cat "{tmp_path}/$5"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return tmp_path


def test_importing_loads_no_torch() -> None:
    code = "import sys, checkpoint_engine.device_utils; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(("has_cuda", "kind"), [(False, "cpu"), (True, "cuda")])
def test_the_device_of_this_process(
    has_cuda: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_cuda)
    manager = DeviceManager()
    assert manager.device_type == kind
    assert manager.device_module is getattr(torch, kind)
    assert manager.backend == {"cpu": "gloo", "cuda": "nccl"}[kind]


def test_an_npu_goes_first(tmp_path: Path) -> None:
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text("from torch_npu import npu\n")
    (package / "npu.py").write_text("def is_available(): return True\n")
    code = (
        "from checkpoint_engine.device_utils import DeviceManager as M; m = M();"
        "print(m.device_type, m.backend, m.device_module.__name__)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert shown == "npu hccl torch_npu.npu\n"


def test_the_uuid_of_a_cpu_is_what_sglang_looks_up() -> None:
    assert device_uuid("cpu") == f"GPU-{platform.machine()}"


def test_the_uuid_of_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        def __init__(self, index: int) -> None:
            self.uuid = f"4f6ca7c6-0000-0000-0000-00000000000{index}"

    monkeypatch.setattr(torch.cuda, "get_device_properties", Properties)
    assert device_uuid("cuda", index=1) == "GPU-4f6ca7c6-0000-0000-0000-000000000001"


def test_an_unknown_device_type() -> None:
    with pytest.raises(UsageError, match="one of npu, cuda, cpu"):
        device_uuid("tpu")


def test_get_ip_is_an_address_of_this_host() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((get_ip(), 0))


@pytest.mark.parametrize(
    ("lookup", "address"), [(lambda _: "10.1.2.3", "10.1.2.3"), (None, "127.0.0.1")]
)
def test_get_ip_without_a_network(
    lookup: object, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRoute(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    def no_resolver(name: str) -> str:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "socket", NoRoute)
    monkeypatch.setattr(socket, "gethostbyname", lookup or no_resolver)
    assert get_ip() == address


@pytest.mark.parametrize(("npu", "chip"), [(0, 0), (0, 1), (3, 0), (7, 1)])
def test_the_npu_of_this_process(fake_npu_smi: Path, npu: int, chip: int) -> None:
    own = process(os.getpid())
    for other in range(npu):
        # Another process's pid that contains ours is not ours.
        stranger = process(int(f"{os.getpid()}1"))
        (fake_npu_smi / str(other)).write_text(
            TWO_CHIPS.format(npu=other, first=stranger, second=IDLE)
        )
    first, second = (own, IDLE) if chip == 0 else (IDLE, own)
    (fake_npu_smi / str(npu)).write_text(TWO_CHIPS.format(npu=npu, first=first, second=second))
    assert npu_generate_uuid() == f"{get_ip()}-{2 * npu + chip}"
    assert device_uuid("npu") == f"NPU-{get_ip()}-{2 * npu + chip}"


def test_several_processes_on_one_chip(fake_npu_smi: Path) -> None:
    text = TWO_CHIPS.format(npu=0, first=process(1), second=f"{process(os.getpid())}\n{process(2)}")
    (fake_npu_smi / "0").write_text(text)
    assert npu_generate_uuid() == f"{get_ip()}-1"


def test_a_process_on_no_npu(fake_npu_smi: Path) -> None:
    (fake_npu_smi / "0").write_text(TWO_CHIPS.format(npu=0, first=process(1), second=IDLE))
    with pytest.raises(UsageError, match="not on any NPU"):
        npu_generate_uuid()


def test_text_that_names_no_chip(fake_npu_smi: Path) -> None:
    (fake_npu_smi / "0").write_text(process(os.getpid()))
    with pytest.raises(UsageError, match="but not its chip"):
        npu_generate_uuid()


def test_no_npu_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="not on PATH"):
        npu_generate_uuid()


def test_an_npu_smi_that_hangs(fake_npu_smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_npu_smi / "npu-smi").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(device_utils, "NPU_SMI_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(UsageError, match=r"did not answer within 0\.1 s"):
        npu_generate_uuid()


def test_another_thread_follows_the_stream_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with an accelerator, as torch says; without one there is nothing to follow."""
    same_stream()()
    here, entered = object(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    same_stream()()  # nothing is queued before it is used first, which a fork may not do
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: here)
    monkeypatch.setattr(
        torch.accelerator, "set_stream", lambda one: entered.append((one, threading.get_ident()))
    )
    enter_stream = same_stream()
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda: object())  # of the thread
    thread = threading.Thread(target=enter_stream)
    thread.start()
    thread.join()
    assert entered == [(here, thread.ident)]
