"""A trainer's live tensors as a source."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from core_tools import BITS, MIB, num_fds
from torch._subclasses.fake_tensor import FakeTensorMode

from checkpoint_engine.dtypes import torch_dtype, torch_shape
from checkpoint_engine.errors import SourceError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.sources import JoinedSource, SafetensorsSource, TensorSource
from checkpoint_engine.store import Store

pytestmark = pytest.mark.usefixtures("no_garbage")


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Row-major, by a way of its own: element by element of a contiguous copy."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    copy.copy_(tensor)
    return bytes(copy.reshape(-1).view(torch.uint8).tolist())


def registered(store: Store, tensors: Mapping[str, torch.Tensor]) -> tuple[Manifest, bytes]:
    shard = store.register("version", TensorSource(tensors))
    store_bytes = bytes(shard.memory)
    store.unregister("version")
    return shard.manifest, store_bytes


@pytest.mark.parametrize("dtype", [dtype for dtype in BITS if not dtype.startswith("F6")])
@pytest.mark.parametrize("shape", [(3, 4), (2, 0), (), (1, 2, 3, 2)], ids=str)
def test_every_dtype(store: Store, dtype: str, shape: tuple[int, ...]) -> None:
    if dtype == "F4" and not shape:
        shape = (2,)
    num_bytes = BITS[dtype] * torch.Size(shape).numel() // 8
    data = torch.arange(7, 7 + num_bytes, dtype=torch.uint8)
    tensor = data.view(torch_dtype(dtype)).reshape(torch_shape(dtype, shape))
    manifest, memory = registered(store, {"w": tensor})
    (meta,) = manifest.tensors
    assert (meta.name, meta.dtype, meta.shape, meta.length) == ("w", dtype, shape, num_bytes)
    assert memory[meta.offset : meta.end] == bytes(data.tolist())


SEQUENCE = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4)
VIEWS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: SEQUENCE.transpose(0, 2),
    "strided": lambda: SEQUENCE[:, ::2, 1::2],
    "expanded": lambda: SEQUENCE[:1, :1, :1].expand(2, 3, 4),
    "a slice": lambda: SEQUENCE[1:],
    "channels last": lambda: SEQUENCE[None].contiguous(memory_format=torch.channels_last),
    "conjugate": lambda: torch.view_as_complex(SEQUENCE.float().reshape(3, 4, 2)).conj(),
    "imaginary part of a conjugate": lambda: VIEWS["conjugate"]().imag,
    "transposed fp8": lambda: SEQUENCE.to(torch.float8_e4m3fn).transpose(0, 1),
    "parameter": lambda: torch.nn.Parameter(SEQUENCE.clone()),
    "made while inferring": torch.inference_mode()(lambda: SEQUENCE * 2),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_stored_as_they_look(store: Store, name: str) -> None:
    view = VIEWS[name]()
    manifest, memory = registered(store, {"w": view})
    (meta,) = manifest.tensors
    assert meta.shape == tuple(view.shape)
    assert memory[meta.offset : meta.end] == bytes_of(view.detach())


def test_a_tensor_that_is_not_contiguous_and_has_many_chunks(store: Store) -> None:
    tensor = torch.randint(0, 256, (3000, 3500), dtype=torch.uint8).t()
    manifest, memory = registered(store, {"w": tensor})
    (meta,) = manifest.tensors
    assert len(meta.chunk_digests) == 16 * 3
    assert memory[: meta.length] == tensor.contiguous().numpy().tobytes()
    contiguous = registered(store, {"w": tensor.contiguous()})[0]
    assert manifest == contiguous


def test_tied_tensors_are_stored_once_under_all_their_names(store: Store) -> None:
    table, other = torch.rand(64, 8), torch.rand(64, 8)
    manifest, _ = registered(
        store, {"z.head": table, "m": other, "embed": table.view(64, 8), "rows": table[:32]}
    )
    places = {meta.name: meta.offset for meta in manifest.tensors}
    assert places["z.head"] == places["embed"]
    assert len(set(places.values())) == 3, "the part of a tensor is a tensor of its own"
    copied, _ = registered(
        store, {"z.head": table.clone(), "m": other, "embed": table, "rows": table[:32]}
    )
    assert manifest.digest == copied.digest
    assert copied.num_bytes - manifest.num_bytes == 64 * 8 * 4


def test_empty_tensors_are_not_tied(store: Store) -> None:
    """They have no bytes to share, and data_ptr is 0 for all of them."""
    tensors = {"a": torch.empty(0), "b": torch.empty(0)}
    assert [spec.names for spec in TensorSource(tensors).specs()] == [("a",), ("b",)]
    manifest, _ = registered(store, tensors)
    assert [meta.name for meta in manifest.tensors] == ["a", "b"]


def test_equal_weights_from_a_file_and_from_a_state_dict_have_one_digest(
    store: Store, tmp_path: Path
) -> None:
    tensors = {
        "layer.weight": torch.rand(300, 7).bfloat16(),
        "scale": torch.tensor(2.5),
        "empty": torch.empty(0, 4, dtype=torch.int8),
        "fp8": torch.rand(16).to(torch.float8_e5m2),
        "big": torch.randint(0, 256, (5 * MIB,), dtype=torch.uint8),
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    source = SafetensorsSource([path])
    from_file = store.register("file", source)
    source.close()
    from_memory = store.register("memory", TensorSource(tensors))
    assert from_file.manifest == from_memory.manifest
    assert from_file.memory == from_memory.memory


def test_tensors_may_change_once_registered(store: Store) -> None:
    tensor = torch.zeros(1000, dtype=torch.uint8)
    shard = store.register("version", TensorSource({"w": tensor}))
    tensor.fill_(1)
    assert bytes(shard.memory[:1000]) == bytes(1000)


def test_reads_on_many_threads(store: Store) -> None:
    """A tensor that is made contiguous on the way is whole for every thread that reads it."""
    tensors = {f"w{n}": torch.randint(0, 256, (512, 64), dtype=torch.uint8).t() for n in range(8)}
    source = TensorSource(tensors)
    gate = threading.Barrier(8)
    outs = {name: bytearray(512 * 64) for name in tensors}

    def read(name: str) -> None:
        gate.wait(10)
        for start in range(0, 512 * 64, 4096):
            source.read_into(name, start, memoryview(outs[name])[start : start + 4096])

    threads = [threading.Thread(target=read, args=(name,)) for name in tensors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outs == {name: tensor.contiguous().numpy().tobytes() for name, tensor in tensors.items()}


class DTensor(torch.Tensor):
    """Bears the name of torch's distributed tensor, whose local part is not the tensor."""


NO_BYTES: dict[str, tuple[Callable[[], object], str]] = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "no dense bytes"),
    "csr": (lambda: torch.eye(3).to_sparse_csr(), "no dense bytes"),
    "meta": (lambda: torch.empty(3, device="meta"), "no dense bytes"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.qint8),
        "no dense bytes",
    ),
    "nested": (
        lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
        "'bad.weight'",
    ),
    "fake": (lambda: FakeTensorMode().from_tensor(torch.ones(3)), "'bad.weight'"),
    "lazy": (lambda: torch.nn.parameter.UninitializedParameter(), "'bad.weight'"),
    "distributed": (lambda: torch.ones(3).as_subclass(DTensor), r"full_tensor\(\)"),
    "complex128": (lambda: torch.ones(3, dtype=torch.complex128), "complex128 cannot be stored"),
    "packed scalar": (
        lambda: torch.empty((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "'bad.weight'",
    ),
    "list": (lambda: [1.0, 2.0], "is a list, not a tensor"),
    "nothing": (lambda: None, "is a NoneType, not a tensor"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("kind", NO_BYTES)
def test_what_has_no_bytes_to_send_is_refused_by_name(store: Store, kind: str) -> None:
    make, why = NO_BYTES[kind]
    tensors: dict[str, Any] = {"good": torch.ones(3), "bad.weight": make()}
    fds = num_fds()
    with pytest.raises(SourceError, match=why) as refusal:
        store.register("version", TensorSource(tensors))
    assert "'bad.weight'" in str(refusal.value)
    assert (store.labels, store.allocated_bytes, num_fds()) == ([], 0, fds)


@pytest.mark.parametrize("name", ["", "n" * 1025, "\ud800"], ids=["empty", "long", "surrogate"])
def test_names_that_no_manifest_has_are_refused(store: Store, name: str) -> None:
    with pytest.raises(SourceError):
        store.register("version", TensorSource({"good": torch.ones(3), name: torch.ones(3)}))
    assert (store.labels, store.allocated_bytes) == ([], 0)


def test_what_is_no_state_dict_is_refused() -> None:
    with pytest.raises(SourceError, match=r"a list is no state dict: pass model\.state_dict\(\)"):
        TensorSource([("a", torch.ones(1))])  # type: ignore[arg-type]


def test_files_and_tensors_together(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.ones(3), "c": torch.zeros(3)}, path)
    source = JoinedSource([path], {"b": torch.full((3,), 2.0)})
    together = store.register("together", source)
    source.close()
    tensors = {"a": torch.ones(3), "b": torch.full((3,), 2.0), "c": torch.zeros(3)}
    assert together.manifest == registered(store, tensors)[0]
    twice = JoinedSource([path], {"c": torch.zeros(3)})
    with pytest.raises(SourceError, match="'c' is given twice"):
        store.register("twice", twice)
    twice.close()


def test_a_file_that_fails_leaves_no_descriptor(tmp_path: Path) -> None:
    fds = num_fds()
    with pytest.raises(SourceError, match="cannot be opened"):
        JoinedSource([tmp_path / "none.safetensors"], {"b": torch.ones(3)})
    assert num_fds() == fds
