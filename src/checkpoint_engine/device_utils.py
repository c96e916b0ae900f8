"""Which accelerator this process runs on, and the name under which engines look it up.

vLLM and SGLang load these names by path. Both sides of a hand-over name a device by a uuid of
their own making, so the spelling matters:

    CUDA    "GPU-" + the uuid that the driver reports
    NPU     "NPU-" + host address + "-" + number of the chip on its host
    CPU     "GPU-" + platform.machine(), the same for every rank: what SGLang looks up on a CPU

    manager = DeviceManager()
    torch.distributed.init_process_group(manager.backend)
    uuid = device_uuid(manager.device_type, index=0)

torch is imported by what needs it, so that importing this module costs nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import re
import socket
import subprocess
from collections.abc import Callable
from types import ModuleType

from checkpoint_engine.errors import UsageError

__all__ = [
    "DeviceManager",
    "device_uuid",
    "get_ip",
    "local_index",
    "npu_generate_uuid",
    "same_stream",
]

MAX_NUM_NPUS = 8  # NPU cards of one host; each carries one or two chips
NPU_SMI_TIMEOUT_SECONDS = 30.0


def same_stream() -> Callable[[], None]:
    """What another thread calls to work on this one's device, behind what is queued there now.

    A thread begins on the default stream of the first device.
    """
    import torch

    manager = DeviceManager()
    if manager.device_type == "cpu" or not manager.device_module.is_initialized():
        return lambda: None  # nothing is queued, and a forked process may have no GPU of its own
    stream = torch.accelerator.current_stream()
    return lambda: torch.accelerator.set_stream(stream)  # and its device


class DeviceManager:
    """The accelerator of this process. A machine without one is a CPU machine, never an error.

    Attributes:
        device_type: "npu", "cuda" or "cpu".
        device_module: `torch_npu.npu`, `torch.cuda` or `torch.cpu`.
        backend: what collectives between such devices use: "hccl", "nccl" or "gloo".

    """

    device_type: str
    device_module: ModuleType
    backend: str

    def __init__(self) -> None:
        import torch

        npu = _torch_npu()
        if npu is not None and npu.is_available():
            self.device_type, self.device_module, self.backend = "npu", npu, "hccl"
        elif torch.cuda.is_available():
            self.device_type, self.device_module, self.backend = "cuda", torch.cuda, "nccl"
        else:
            self.device_type, self.device_module, self.backend = "cpu", torch.cpu, "gloo"


def device_uuid(device_type: str | None = None, index: int = 0) -> str:
    """The name under which an engine looks up a device, as in the module's table.

    Args:
        device_type: "npu", "cuda" or "cpu"; None for what this process runs on.
        index: which CUDA device of those visible; an NPU is the one this process uses.

    Raises:
        UsageError: there is no such device type, or this process is not on an NPU.

    """
    if device_type is None:
        device_type = DeviceManager().device_type
    if device_type == "cuda":
        import torch

        return f"GPU-{torch.cuda.get_device_properties(index).uuid}"
    if device_type == "npu":
        return f"NPU-{npu_generate_uuid()}"
    if device_type == "cpu":
        return f"GPU-{platform.machine()}"
    raise UsageError(f"{device_type!r} is no device type; it is one of npu, cuda, cpu")


def local_index(rank: int, num_devices: int | None) -> int:
    """The device of a rank on its host: `$LOCAL_RANK`, else the rank, counted round the devices."""
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return local_rank % num_devices if num_devices else local_rank


def get_ip() -> str:
    """The IPv4 address at which other hosts reach this one; "127.0.0.1" where there is no network.

    Nothing is sent: connecting a datagram socket only asks the routing table. 192.0.2.1 is an
    address reserved for documentation (RFC 5737), so the answer is that of the default route.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
            return str(probe.getsockname()[0])
        except OSError:
            pass  # no route: the host's own name is the next best
    try:
        return socket.gethostbyname(socket.gethostname())
    except OSError:
        return "127.0.0.1"


def npu_generate_uuid() -> str:
    """The address of this host and the number of the NPU chip on it that this process uses.

    The chip is found by this process's pid in what `npu-smi` says of each NPU, so a tensor must
    have been put on it before.

    Raises:
        UsageError: npu-smi is missing or fails, or this process is not on any NPU.

    """
    pid = os.getpid()
    for npu_id in range(MAX_NUM_NPUS):
        chip = _chip_of(pid, _processes_on(npu_id))
        if chip is not None:
            chip_id, num_chips = chip
            return f"{get_ip()}-{npu_id * num_chips + chip_id}"
    raise UsageError(
        f"process {pid} is not on any NPU that npu-smi knows; put a tensor on the device first, "
        "and in a container share the host's pid namespace (--pid=host)"
    )


def _torch_npu() -> ModuleType | None:
    if importlib.util.find_spec("torch_npu") is None:
        return None
    npu = importlib.import_module("torch_npu").npu
    assert isinstance(npu, ModuleType)
    return npu


def _processes_on(npu_id: int) -> str:
    """What npu-smi prints of the processes on one NPU; "" where there is no such NPU."""
    command = ["npu-smi", "info", "-t", "proc-mem", "-i", str(npu_id)]
    try:
        done = subprocess.run(  # noqa: S603  a fixed command and a number
            command, capture_output=True, text=True, timeout=NPU_SMI_TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError as error:
        raise UsageError(
            "npu-smi is not on PATH, so this host has no NPU or no driver for it; "
            "install the Ascend driver, or use the cpu device type"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UsageError(
            f"{' '.join(command)} did not answer within {NPU_SMI_TIMEOUT_SECONDS:g} s; "
            "check the Ascend driver"
        ) from error
    return done.stdout if done.returncode == 0 else ""


def _chip_of(pid: int, text: str) -> tuple[int, int] | None:
    """The id of the chip that `pid` uses and the number of chips, from npu-smi's text.

    A chip's processes are listed before its id:

        NPU ID                         : 0
        Chip Count                     : 2
        Process id:4711 Process name:python  Process memory(MB):48208
        Chip ID                        : 0
    """
    process = re.search(rf"Process id\s*:\s*{pid}\b", text)
    if process is None:
        return None
    num_chips = re.search(r"Chip Count\s*:\s*(\d+)", text)
    chip_id = re.search(r"Chip ID\s*:\s*(\d+)", text[process.end() :])
    if num_chips is None or chip_id is None:
        raise UsageError(f"npu-smi names process {pid} but not its chip: {text.strip()[:300]!r}")
    return int(chip_id[1]), int(num_chips[1])
