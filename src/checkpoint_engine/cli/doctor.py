"""`ckpt-engine doctor`: whether this machine can do what an update needs, and the remedy if not.

Each check is a function that looks at one thing and returns a `Check`. What can be tried is
tried (sealing a memfd, passing a descriptor, binding a port) rather than read off a version.
Libraries are looked up in the installed distributions, never imported; torch alone is loaded.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import os
import resource
import socket
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer
from rich.text import Text

from checkpoint_engine.cli.console import new_table, out, print_json, printable
from checkpoint_engine.errors import HandoverError

__all__ = ["Check", "doctor", "run_checks"]

STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
GIB = 1 << 30
MIN_FREE_BYTES = GIB  # a small model in two versions
MIN_OPEN_FILES = 1024

REPLICA_LIBRARIES = ("transformers", "fastapi", "uvicorn")
OTHER_LIBRARIES = (
    "vllm",
    "sglang",
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-non-cuda",
    "nixl",
    "ray",
)


class Check(msgspec.Struct, frozen=True):
    """What one check found, and what to do where it is not "ok"."""

    name: str
    result: Literal["ok", "warn", "fail"]
    found: str
    remedy: str = ""


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check what an update needs of this machine. Exits with 1 if a check fails."""
    checks = list(run_checks(os.environ))
    failed = any(check.result == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": checks})
    else:
        table = new_table("", "check", "found, and the remedy")
        for check in checks:
            found = Text(printable(check.found))
            if check.remedy:
                found.append(f"\n-> {check.remedy}", style="bold")
            table.add_row(Text(check.result, style=STYLES[check.result]), check.name, found)
        out.print(table)
    if failed:
        raise typer.Exit(1)


def run_checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """All checks, in the order in which they are shown."""
    yield check_python(sys.version_info[:3])
    yield from check_torch()
    yield check_shared_folder(Path("/dev/shm"))  # noqa: S108  it is looked at, not used
    yield check_memory(Path("/proc/meminfo"))
    yield check_control_group(Path("/sys/fs/cgroup"), Path("/proc/self/cgroup"))
    yield check_locked_memory(Path("/sys/class/infiniband"))
    yield check_open_files()
    yield check_memfd()
    yield check_descriptor_passing()
    yield check_socket_folder()
    yield check_ranks(environ)
    yield check_master(environ)
    yield check_replica_libraries()
    yield check_other_libraries()
    yield check_import_name()


def check_python(version: tuple[int, ...]) -> Check:
    """Whether this Python is one that the project is made for."""
    found = ".".join(map(str, version))
    if (3, 10) <= version[:2] < (3, 14):
        return Check("Python", "ok", found)
    return Check("Python", "fail", found, "use Python 3.10 to 3.13")


def check_torch() -> Iterator[Check]:
    """Whether torch loads, with which devices, and whether it has gloo."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import torch
            from torch import distributed

            from checkpoint_engine.device_utils import DeviceManager

            device = DeviceManager()
        except (ImportError, OSError) as error:
            yield Check("torch", "fail", str(error), "install torch for this Python and platform")
            return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    devices = "CPU only"
    if device.device_type != "cpu":
        devices = f"{device.device_module.device_count()} x {device.device_type}"
    troubles = [str(warning.message) for warning in caught if "CUDA" in str(warning.message)]
    yield Check(
        "torch",
        "warn" if troubles else "ok",
        "; ".join([f"{torch.__version__} ({build}), {devices}", *troubles]),
        "match the driver and torch's build" if troubles else "",
    )
    if distributed.is_available() and distributed.is_gloo_available():
        yield Check("gloo", "ok", "available")
    else:
        yield Check("gloo", "fail", "torch was built without it", "install an official torch build")


def check_shared_folder(folder: Path) -> Check:
    """Whether /dev/shm has room for what NCCL and engines put there; versions lie elsewhere."""
    try:
        stats = os.statvfs(folder)
    except OSError as error:
        return Check(str(folder), "warn", f"{error.strerror}", f"mount a tmpfs at {folder}")
    free_bytes = stats.f_bavail * stats.f_frsize
    found = f"{_size(stats.f_blocks * stats.f_frsize)}, {_size(free_bytes)} free"
    if free_bytes < MIN_FREE_BYTES:
        return Check(str(folder), "warn", found, "free some; for a container, --shm-size=8g")
    return Check(str(folder), "ok", found)


def check_memory(meminfo: Path) -> Check:
    """Whether versions have room in this host's memory."""
    lines = (line.split() for line in meminfo.read_text().splitlines())
    sizes = {words[0]: int(words[1]) * 1024 for words in lines}
    free_bytes = sizes["MemAvailable:"]
    found = f"{_size(free_bytes)} of {_size(sizes['MemTotal:'])} available"
    if free_bytes < MIN_FREE_BYTES:
        return Check("memory", "warn", found, "free some: a host keeps 2 versions beside the model")
    return Check("memory", "ok", found)


def check_control_group(root: Path, membership: Path) -> Check:
    """Whether the tightest memory limit of this process's control groups leaves room."""
    name = "control group"
    folders = [root / "memory"]  # version 1, as seen inside a container
    for line in membership.read_text().splitlines():
        if line.startswith("0::"):  # version 2
            own = root / line[3:].lstrip("/")
            folders += [own, *(folder for folder in own.parents if folder.is_relative_to(root))]
    room = [(*limit, folder) for folder in folders if (limit := _memory_limit(folder)) is not None]
    if not room:
        return Check(name, "ok", "no memory limit")
    free_bytes, limit_bytes, folder = min(room)
    found = f"{_size(free_bytes)} of {_size(limit_bytes)} left in {folder}"
    if free_bytes < MIN_FREE_BYTES:
        return Check(name, "warn", found, "raise the limit (a container's --memory, a pod's limit)")
    return Check(name, "ok", found)


def check_locked_memory(rdma_devices: Path) -> Check:
    """Whether RDMA, where there is any, may register memory."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found = "no limit" if soft == resource.RLIM_INFINITY else _size(soft)
    if soft != resource.RLIM_INFINITY and rdma_devices.is_dir() and any(rdma_devices.iterdir()):
        remedy = "ulimit -l unlimited (a container's --ulimit memlock=-1): RDMA registers memory"
        return Check("locked memory", "warn", found, remedy)
    return Check("locked memory", "ok", found)


def check_open_files() -> Check:
    """Whether a process may hold the sockets and descriptors of many peers."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else str(soft)
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        return Check("open files", "warn", found, f"ulimit -n {MIN_OPEN_FILES * 64}")
    return Check("open files", "ok", found)


def check_memfd() -> Check:
    """Whether anonymous memory can be made and sealed against shrinking."""
    name, remedy = "memfd sealing", "use Linux 3.17 or later, and a sandbox that allows it"
    try:
        descriptor = os.memfd_create("doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as error:
        return Check(name, "fail", f"memfd_create: {error.strerror}", remedy)
    try:
        os.ftruncate(descriptor, 4096)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        os.ftruncate(descriptor, 0)
    except PermissionError:
        return Check(name, "ok", "a sealed memfd cannot shrink")
    except OSError as error:
        return Check(name, "fail", f"sealing: {error.strerror}", remedy)
    finally:
        os.close(descriptor)
    return Check(name, "fail", "a sealed memfd could be shrunk", remedy)


def check_descriptor_passing() -> Check:
    """Whether a descriptor passes over a Unix socket and still leads to the same bytes."""
    name, remedy = "descriptor passing", "use a sandbox that allows SCM_RIGHTS on Unix sockets"
    try:
        left, right = socket.socketpair(socket.AF_UNIX)
        with left, right, os.fdopen(os.memfd_create("doctor"), "w+b") as memory:
            memory.write(b"passed")
            memory.flush()
            socket.send_fds(left, [b"x"], [memory.fileno()])
            _, received, _, _ = socket.recv_fds(right, 1, maxfds=1)
            with os.fdopen(received[0], "rb") as passed:
                whole = os.pread(passed.fileno(), 6, 0) == b"passed"
    except (OSError, IndexError) as error:
        return Check(name, "fail", str(error), remedy)
    if not whole:
        return Check(name, "fail", "the descriptor leads elsewhere", remedy)
    return Check(name, "ok", "works")


def check_socket_folder() -> Check:
    """Whether the folder of our sockets is safe from other users and its path short enough."""
    from checkpoint_engine.transport.sockets import socket_dir

    try:
        return Check("socket folder", "ok", str(socket_dir()))
    except (HandoverError, OSError) as error:
        remedy = "set CKPT_ENGINE_SOCKET_DIR to a short path of your own with mode 0700"
        return Check("socket folder", "fail", str(error), remedy)


def check_ranks(environ: Mapping[str, str]) -> Check:
    """Whether RANK and WORLD_SIZE, where a launcher sets them, make sense."""
    values = {name: environ[name] for name in ("RANK", "WORLD_SIZE") if name in environ}
    if not values:
        return Check("ranks", "ok", "not set: one process")
    found = ", ".join(f"{name}={value}" for name, value in values.items())
    sensible = len(values) == 2 and all(value.isdecimal() for value in values.values())
    if sensible and int(values["RANK"]) < int(values["WORLD_SIZE"]):
        return Check("ranks", "ok", found)
    return Check("ranks", "fail", found, "start ranks with torchrun, or unset both variables")


def check_master(environ: Mapping[str, str]) -> Check:
    """Whether MASTER_ADDR resolves and, if it is this host's, whether MASTER_PORT is free."""
    name, remedy = "rendezvous", "set MASTER_ADDR and MASTER_PORT to a host and port of rank 0"
    host, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if host is None and port is None:
        return Check(name, "ok", "not set")
    found = f"{host or '(no MASTER_ADDR)'}:{port or '(no MASTER_PORT)'}"
    if not host or not port or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        return Check(name, "fail", found, remedy)
    try:
        family, _, _, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    except OSError as error:
        return Check(name, "fail", f"{found}: {error.strerror}", remedy)
    with socket.socket(family) as listener:
        try:
            listener.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return Check(name, "ok", f"{found}, on another host")
            remedy = "unless this is rank 0's own store, choose another MASTER_PORT"
            return Check(name, "warn", f"{found}: {error.strerror}", remedy)
    return Check(name, "ok", f"{found}, free on this host")


def check_replica_libraries() -> Check:
    """Whether the libraries of our own replica and of the demo are installed."""
    present, missing = _versions(REPLICA_LIBRARIES)
    if missing:
        found = f"not installed: {', '.join(missing)}"
        return Check("replica", "warn", found, "pip install 'ckpt-engine[transformers]'")
    return Check("replica", "ok", present)


def check_other_libraries() -> Check:
    """Which engines and transports are installed; none of them is needed."""
    present, _ = _versions(OTHER_LIBRARIES)
    return Check("engines, transports", "ok", present or "none")


def check_import_name() -> Check:
    """Whether another distribution's files are mixed with ours.

    MoonshotAI's `checkpoint-engine` has the same import name: the last one installed wins, file
    by file.
    """
    owners = set(importlib.metadata.packages_distributions().get("checkpoint_engine", ()))
    others = sorted(owners - {"ckpt-engine"})
    if others:
        remedy = f"pip uninstall {' '.join(others)}, then install ckpt-engine again"
        return Check("import name", "fail", f"checkpoint_engine is also of {others}", remedy)
    return Check("import name", "ok", "checkpoint_engine is ours alone")


def _memory_limit(folder: Path) -> tuple[int, int] | None:
    """The bytes left and the bytes allowed in a control group; None without a limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        if (folder / limit).exists():
            text = (folder / limit).read_text().strip()
            if text != "max" and int(text) < 1 << 60:  # version 1 says a huge number for none
                return int(text) - int((folder / usage).read_text()), int(text)
    return None


def _versions(distributions: tuple[str, ...]) -> tuple[str, list[str]]:
    """What is installed, with versions, as text; and what is not."""
    present, missing = [], []
    for name in distributions:
        try:
            present.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return ", ".join(present), missing


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / (1 << 20):.0f} MiB"
