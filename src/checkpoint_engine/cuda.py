"""The few calls of CUDA that torch lacks: kernels from source, pinned maps, and shared memory.

They go to the driver, so that a refusal is an error here and not, as with the runtime's functions,
in whatever torch does next. Everything else of CUDA is torch's own. Importing this needs no GPU.

    kernels = compile_kernels(SOURCE, ["sums"], device)
    kernels["sums"](grid=(num_chunks, 128), block=256, arguments=[data, table, out])

    unpin = pin(owner, mapped, writable=False)      # page-locked: copies at the speed of the bus
    unpin()

    data, handle = share(num_bytes, device)         # of a GPU; the handle is plain bytes
    data = opened(handle, num_bytes, device)        # in another process of the host

    wait(event)                                     # as `event.synchronize()`, with a deadline

What is shared is the driver's own, beside torch's allocator: so it does not matter how that works
(expandable segments cannot be handed over), and memory that is freed is not cached.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sysconfig
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from checkpoint_engine.errors import AdapterError, DeadlineExceeded, HandoverError

__all__ = [
    "Kernel",
    "compile_kernels",
    "new_event",
    "new_stream",
    "opened",
    "pin",
    "share",
    "wait",
]

WAIT_SECONDS = 120.0  # for copies and digests of some 100 MB; a collective before them has as long
POLL_SECONDS = 5e-5

HOST_REGISTER_PORTABLE, HOST_REGISTER_READ_ONLY = 1, 8  # the values are the driver's
IPC_LAZY_ENABLE_PEER_ACCESS = 1
IPC_HANDLE_BYTES = 64
BLOCK_BYTES = 2 << 20  # smaller allocations share a block, and all of that is handed over


@dataclass(frozen=True)
class Kernel:
    """A function that runs on one device; see the module's text."""

    function: ctypes.c_void_p
    device: torch.device

    def __call__(
        self, *, grid: tuple[int, int], block: int, arguments: Sequence[torch.Tensor]
    ) -> None:
        """Queue it on the current stream of its device. Its arguments are addresses of tensors."""
        values = [ctypes.c_void_p(tensor.data_ptr()) for tensor in arguments]
        addresses = (ctypes.c_void_p * len(values))(
            *(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in values)
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        with torch.cuda.device(self.device):
            _enter_context()  # which this thread may lack, where torch had memory at hand
            code = _driver().cuLaunchKernel(
                self.function, *grid, 1, block, 1, 1, 0, stream, addresses, None
            )
        _check(code, "a kernel was not started")


@functools.cache
def compile_kernels(source: str, names: tuple[str, ...], device: torch.device) -> dict[str, Kernel]:
    """Compile CUDA C++ for a device; once in a process, as it takes a fraction of a second.

    Args:
        source: whose functions are `extern "C"`.
        names: those that are wanted.
        device: with its index.

    Raises:
        AdapterError: the compiler that comes with torch is missing or refuses.
    """
    torch.zeros(1, device=device)  # makes the device's context current on this thread
    module, kernels = ctypes.c_void_p(), {}
    image = _compiled(source, "sm_{}{}".format(*torch.cuda.get_device_capability(device)))
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), "a kernel was not loaded")
    for name in names:
        function = ctypes.c_void_p()
        found = _driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode())
        _check(found, f"there is no kernel {name}")
        kernels[name] = Kernel(function, device)
    return kernels


def new_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream of this device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def new_event() -> torch.cuda.Event:
    """An event, of whatever device it is first recorded on; it is past until then."""
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def wait(event: torch.cuda.Event) -> None:
    """Wait until the device has come to an event.

    Raises:
        DeadlineExceeded: it does not; something that was queued before hangs.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while not event.query():  # type: ignore[no-untyped-call]
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"the GPU is not done in {WAIT_SECONDS:.0f} s with what is queued on it: a kernel "
                "hangs there, or a collective that waits for another rank"
            )
        time.sleep(POLL_SECONDS)


def pin(owner: object, mapped: mmap.mmap, *, writable: bool) -> Callable[[], object]:
    """Lock mapped pages into memory and let every GPU of this process copy from and to them.

    Args:
        owner: with it the pages are unpinned at the latest.
        mapped: kept until they are.
        writable: whether the map is; a private one would be copied, page by page.

    Returns:
        What unpins them. No copy from or to them may be under way then; may be called twice.

    Raises:
        HandoverError: the driver refuses, or the memory may not be locked.
    """
    flags = HOST_REGISTER_PORTABLE | (0 if writable else HOST_REGISTER_READ_ONLY)
    address, size = np.frombuffer(mapped, dtype=np.uint8).ctypes.data, len(mapped)
    try:
        driver = _driver()
    except OSError as error:
        raise HandoverError(f"{size} bytes cannot be pinned: {error}") from error
    _enter_context()
    code = driver.cuMemHostRegister_v2(ctypes.c_void_p(address), ctypes.c_size_t(size), flags)
    if code:
        raise HandoverError(f"{size} bytes cannot be pinned: {_error(code)}")
    unpin = weakref.finalize(owner, _unpin, address, mapped)
    unpin.atexit = False  # a process that ends has no pins, and CUDA may be gone before this
    return unpin


def _unpin(address: int, mapped: mmap.mmap) -> None:
    """The map is kept by being an argument: it must not be gone before it is unpinned."""
    _enter_context()
    _check(_driver().cuMemHostUnregister(ctypes.c_void_p(address)), "memory stays pinned")


class _IpcHandle(ctypes.Structure):
    _fields_ = (("field", ctypes.c_ubyte * IPC_HANDLE_BYTES),)


class _Memory:
    """What torch takes for a tensor, which keeps it; freed with the last one that views it."""

    def __init__(
        self, address: int, num_bytes: int, device: torch.device, free: Callable[..., None]
    ) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
        weakref.finalize(self, free, address, device).atexit = False


def share(num_bytes: int, device: torch.device) -> tuple[torch.Tensor, bytes]:
    """Memory for other processes of this host, and what they need to open it.

    It is freed with the last tensor that views it; by then the others must be done with it.

    Raises:
        HandoverError: there is not so much, or this machine's CUDA shares none.
    """
    address, handle = ctypes.c_uint64(), _IpcHandle()
    size = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
    with torch.cuda.device(device):
        _enter_context()
        if code := _driver().cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)):
            raise HandoverError(f"{size} bytes cannot be allocated on {device}: {_error(code)}")
        memory = _Memory(address.value, num_bytes, device, _free)
        if code := _driver().cuIpcGetMemHandle(ctypes.byref(handle), address):
            raise HandoverError(f"memory of {device} cannot be shared: {_error(code)}")
        return torch.as_tensor(memory, device=device), bytes(handle)


def opened(handle: bytes, num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory of another process on the same device, until the last tensor that views it is gone.

    Raises:
        HandoverError: it is gone, or this process's own.
    """
    if len(handle) != IPC_HANDLE_BYTES:
        raise HandoverError(f"a handle of CUDA IPC has {IPC_HANDLE_BYTES} bytes, not {len(handle)}")
    address = ctypes.c_uint64()
    with torch.cuda.device(device):
        _enter_context()
        code = _driver().cuIpcOpenMemHandle_v2(
            ctypes.byref(address),
            _IpcHandle.from_buffer_copy(handle),
            ctypes.c_uint(IPC_LAZY_ENABLE_PEER_ACCESS),
        )
        if code:
            raise HandoverError(f"shared memory of {device} cannot be opened: {_error(code)}")
        return torch.as_tensor(_Memory(address.value, num_bytes, device, _close), device=device)


def _free(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        _enter_context()
        _check(_driver().cuMemFree_v2(ctypes.c_uint64(address)), "shared memory is not freed")


def _close(address: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        _enter_context()
        code = _driver().cuIpcCloseMemHandle(ctypes.c_uint64(address))
        _check(code, "shared memory is not closed")


def _enter_context() -> None:
    """The driver's calls go to the context of this thread's current device, once it has one."""
    torch.zeros(1, device="cuda")


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


@functools.cache
def _compiler() -> ctypes.CDLL:
    """NVRTC, which torch's CUDA builds need themselves, and which is not always loaded."""
    name = f"libnvrtc.so.{(torch.version.cuda or '').partition('.')[0]}"
    packages = Path(sysconfig.get_paths()["purelib"], "nvidia")
    places = [name, *map(str, sorted(packages.glob(f"*/lib/{name}")))]
    for place in places:
        try:
            return ctypes.CDLL(place)
        except OSError:
            continue
    raise AdapterError(f"{name} is not found: it is part of the CUDA build of torch")


def _compiled(source: str, architecture: str) -> bytes:
    compiler, program = _compiler(), ctypes.c_void_p()
    options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
    size = ctypes.c_size_t()
    code = compiler.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None
    )
    try:
        code = code or compiler.nvrtcCompileProgram(program, len(options), options)
        if code:
            compiler.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value or 1)
            compiler.nvrtcGetProgramLog(program, log)
            raise AdapterError(f"kernels do not compile for {architecture}: {log.value.decode()}")
        compiler.nvrtcGetCUBINSize(program, ctypes.byref(size))
        image = ctypes.create_string_buffer(size.value)
        compiler.nvrtcGetCUBIN(program, image)
        return image.raw
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))


def _check(code: int, what: str) -> None:
    if code:
        raise AdapterError(f"{what}: {_error(code)}")


def _error(code: int) -> str:
    name = ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(name))
    return f"{(name.value or b'?').decode()} ({code})"
