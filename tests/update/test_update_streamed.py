"""Versions that are read from their files in the pause: exact, checked, and undone from files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from toy_adapter import DEADLINES, EPOCH, Memory, Scene
from update_models import Odd, Server, bytes_of, fresh

from checkpoint_engine.adapters import callback
from checkpoint_engine.adapters.base import Identity
from checkpoint_engine.adapters.callback import CallbackAdapter, Kept
from checkpoint_engine.adapters.streamed import Streamed
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import (
    AdapterError,
    DeadlineExceeded,
    SourceError,
    StoreError,
    UsageError,
    VerificationError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.memory import byte_workers
from checkpoint_engine.sources import SafetensorsSource, TensorSource
from checkpoint_engine.sources.files import TensorFiles
from checkpoint_engine.store import Store, digest_in_place
from checkpoint_engine.transport.files import FilesAt
from checkpoint_engine.update.protocol import Offer, Proceed, Ready, Stop, Withdrawn
from checkpoint_engine.update.sessions import Door
from checkpoint_engine.update.streaming import Streams

APPLY, PUBLISH, STOP = Proceed(step="apply"), Proceed(step="publish"), Stop(reason="no")


class Stopping(Server):
    """Does something in the moment in which requests stop."""

    def __init__(self, on_hold: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.on_hold = on_hold

    def hold(self, timeout_seconds: float) -> None:
        super().hold(timeout_seconds)
        self.on_hold()


@dataclass
class Stage:
    """A model with its adapter, a rank's files and door, and the sessions that bring versions."""

    folder: Path
    model: Odd = field(default_factory=lambda: Odd(seed=1))
    server: Stopping = field(default_factory=Stopping)
    loaded_from: Callable[[], SafetensorsSource] | None = None
    streams: Streams = field(default_factory=Streams)
    epoch: int = EPOCH

    def __post_init__(self) -> None:
        self.door = Door(lambda name: None, self.streams.files)
        self.adapter = TransformersAdapter(
            self.model, Identity(replica="r", engine="e"), self.server, self.loaded_from
        )

    def register(self, seed: int, dtype: torch.dtype = torch.float32) -> Path:
        path = save(self.folder / f"{seed}.safetensors", seed, dtype)
        source = SafetensorsSource([path])
        self.streams.register(f"step-{seed}", source, Store(), mode="streamed", pooled=False)
        return path

    def play(self, seed: int, *replies: Any, adapter: Any = None) -> tuple[str, str, str]:
        """What the session ended as, its way back, and what went wrong."""
        stream = self.streams.get(f"step-{seed}")
        assert stream is not None
        self.epoch += 1
        offer = Offer(
            update=f"update-{self.epoch}",
            epoch=self.epoch,
            version=Version(label=f"step-{seed}", digest=stream.manifest.digest),
            manifest=stream.manifest.to_msgpack(),
            parts=(),
            files=(FilesAt(address=self.door.address, name=stream.name),),
            deadlines=DEADLINES,
        )
        scene = Scene(Memory(), adapter or self.adapter, offer, b"", b"")
        outcome = scene.play(offer, *replies)
        ways = [message.way_back for message in scene.sent if isinstance(message, Ready)]
        error = next((m.error for m in scene.sent if isinstance(m, Withdrawn)), None)
        return outcome.state, "".join(ways), str(error or "")

    def bring(self, seed: int) -> None:
        self.register(seed)
        assert self.play(seed, APPLY, PUBLISH)[0] == "published"

    @property
    def weights(self) -> dict[str, bytes]:
        return bytes_of(self.model)


def save(path: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    """Each name with bytes of its own, as files must have them."""
    save_file({name: tensor.clone() for name, tensor in fresh(seed, dtype).items()}, path)
    return path


def spoil(path: Path, at: int) -> None:
    """Change one bit so that neither size nor time tell."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(at, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    stage.door.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_streamed_is_what_the_files_hold(stage: Stage, dtype: torch.dtype) -> None:
    """Tied, transposed, empty, scalar and large tensors, as they are and cast."""
    stage.register(2, dtype)
    assert stage.play(2, APPLY, PUBLISH) == ("published", "none", "")
    assert stage.weights == bytes_of(Odd(2, dtype).to(torch.float32))
    assert not stage.server.held


@pytest.mark.parametrize("verdict", [STOP, DeadlineExceeded("silent")], ids=["stop", "silence"])
def test_the_way_back_is_exact_with_the_server_gone_and_the_files_deleted(
    stage: Stage, verdict: Any
) -> None:
    stage.bring(2)
    before = stage.weights
    stage.register(3)

    def lose_everything() -> None:
        stage.streams.close()
        stage.door.close()
        for path in stage.folder.iterdir():
            path.unlink()

    stage.server.on_hold = lose_everything
    state, way_back, _ = stage.play(3, APPLY, verdict)
    assert (state, way_back) == ("kept", "source")
    assert stage.weights == before
    assert (stage.server.label, stage.server.torn) == ("step-2", None)


def test_without_a_way_back_a_replica_is_torn_and_the_next_update_mends_it(stage: Stage) -> None:
    stage.register(2)
    state, way_back, error = stage.play(2, APPLY, STOP)
    assert (state, way_back) == ("torn", "none")
    assert "no way back" in error
    assert stage.server.torn is not None
    assert stage.adapter.base() is None
    assert stage.play(2, APPLY, PUBLISH)[0] == "published"
    assert (stage.weights, stage.server.torn) == (bytes_of(Odd(2)), None)


def test_a_model_goes_back_to_the_files_that_it_was_loaded_from(tmp_path: Path) -> None:
    path = save(tmp_path / "1.safetensors", seed=1)
    stage = Stage(tmp_path, loaded_from=lambda: SafetensorsSource([path]))
    before = stage.weights
    stage.register(2)
    assert stage.play(2, APPLY, STOP)[:2] == ("kept", "source")
    assert stage.weights == before
    stage.door.close()


@pytest.mark.parametrize("now", [7, None], ids=["other weights", "no file"])
def test_files_that_no_longer_hold_what_was_loaded_are_no_way_back(
    tmp_path: Path, now: int | None
) -> None:
    path = tmp_path / "1.safetensors"
    if now is not None:
        save(path, now)
    stage = Stage(tmp_path, loaded_from=lambda: SafetensorsSource([path]))
    stage.register(2)
    assert stage.play(2, APPLY, PUBLISH)[:2] == ("published", "none")
    stage.door.close()


def test_a_base_whose_file_was_written_into_is_no_way_back(stage: Stage) -> None:
    stage.bring(2)
    spoil(stage.folder / "2.safetensors", -1)
    os.utime(stage.folder / "2.safetensors")
    stage.register(3)
    assert stage.play(3, APPLY, PUBLISH)[:2] == ("published", "none")


@pytest.mark.parametrize("name", ["embedding", "scale"])
def test_a_byte_that_changed_is_found_before_it_is_written(stage: Stage, name: str) -> None:
    """Names its tensor, whether it is the first that is read or one in the middle."""
    stage.bring(2)
    before = stage.weights
    path = stage.register(3)
    positions = SafetensorsSource([path]).files.opened[0][0].positions
    spoil(path, positions[name] - path.stat().st_size)
    state, _, error = stage.play(3, APPLY)
    assert state == "kept"
    assert f"VerificationError: tensor '{name}'" in error
    assert str(path) in error
    assert stage.weights == before


def test_wrong_first_bytes_change_nothing_even_without_a_way_back(stage: Stage) -> None:
    before = stage.weights
    path = stage.register(2)
    positions = SafetensorsSource([path]).files.opened[0][0].positions
    spoil(path, positions["embedding"] - path.stat().st_size)
    state, way_back, error = stage.play(2, APPLY)
    assert (state, way_back) == ("kept", "none")
    assert "tensor 'embedding'" in error
    assert stage.weights == before


def test_a_file_that_was_replaced_in_place_is_refused_before_anything_stops(stage: Stage) -> None:
    path = stage.register(2)
    path.write_bytes(save(stage.folder / "other", seed=3).read_bytes())
    state, way_back, error = stage.play(2, APPLY)
    assert (state, way_back) == ("kept", "")
    assert f"SourceError: {path}: the file was changed" in error


def test_a_file_that_is_truncated_while_requests_wait_leads_back(stage: Stage) -> None:
    stage.bring(2)
    before = stage.weights
    path = stage.register(3)
    stage.server.on_hold = lambda: os.truncate(path, path.stat().st_size // 2)
    state, way_back, error = stage.play(3, APPLY)
    assert (state, way_back) == ("kept", "source")
    assert f"SourceError: {path}" in error
    assert "truncated" in error
    assert stage.weights == before


def test_a_version_that_was_unregistered_is_refused(stage: Stage) -> None:
    stage.register(2)
    stage.door.close()
    stage.door = Door(lambda name: None, Streams().files)
    state, _, error = stage.play(2, APPLY)
    assert state == "kept"
    assert "their version was unregistered" in error


def test_reading_ends_with_the_pause(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too slow fails the update here, not in the report alone."""
    stage.bring(2)
    before = stage.weights
    source = SafetensorsSource([save(stage.folder / "3.safetensors", 3)])
    content = Streamed(digest_in_place(source), source.files)
    stage.adapter.prepare(content, Version(label="step-3", digest=content.manifest.digest))
    stage.adapter.pause(0.1)
    read_into, reads = source.files.read_into, []

    def slowly(name: str, start: int, out: memoryview) -> None:
        time.sleep(0.05)
        reads.append(name)
        read_into(name, start, out)

    monkeypatch.setattr(source.files, "read_into", slowly)
    with pytest.raises(DeadlineExceeded, match="in time"):
        stage.adapter.apply()
    assert "embedding" in reads
    assert "scale" not in reads
    stage.adapter.roll_back()
    stage.adapter.resume()
    assert stage.weights == before


def test_descriptors_go_with_the_versions(stage: Stage) -> None:
    def num_open() -> int:
        return sum(
            os.path.realpath(fd).startswith(str(stage.folder))
            for fd in Path("/proc/self/fd").iterdir()
        )

    counts = []
    for seed in range(2, 6):
        stage.bring(seed)
        stage.streams.unregister(f"step-{seed}")
        counts.append(num_open())
    assert counts == [1, 2, 2, 2], "what is served, and the version before"


# Loaders, which take whole tensors


class Loader:
    """Fails in the call of this number."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.calls: list[int] = []
        self.failing_call: int | None = None

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.calls.append(sum(tensor.nbytes for _, tensor in named))
        if len(self.calls) == self.failing_call:
            raise RuntimeError("refused")
        self.weights.update(named)  # views are kept, as loaders may

    def adapter(self, kept: Kept) -> CallbackAdapter:
        return CallbackAdapter(self.load_weights, None, torch.device("cpu"), kept)

    def holds(self, seed: int) -> bool:
        expected = fresh(seed)
        same = (torch.equal(self.weights[name], tensor) for name, tensor in expected.items())
        return self.weights.keys() == expected.keys() and all(same)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(callback, "STREAMED_BYTES", 150)
    return 150


def test_a_loader_gets_whole_tensors_in_groups_and_may_keep_them(
    stage: Stage, small_groups: int
) -> None:
    loader = Loader()
    for seed in (2, 3):
        stage.register(seed)
    first = loader.adapter(Kept())
    assert stage.play(2, APPLY, PUBLISH, adapter=first)[:2] == ("published", "none")
    assert loader.holds(2)
    assert sorted(loader.calls)[-2] <= small_groups < max(loader.calls), "one tensor, or a few"
    loader.calls.clear()
    loader.failing_call = 3
    second = loader.adapter(first.keep())
    assert stage.play(3, APPLY, adapter=second)[:2] == ("kept", "source")
    assert loader.holds(2)
    assert stage.play(3, APPLY, PUBLISH, adapter=loader.adapter(second.keep()))[0] == "published"
    assert loader.holds(3)


def test_what_a_loader_left_is_let_go_of_before_the_way_back(
    stage: Stage, small_groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    groups = CallbackAdapter._groups

    def watched(adapter: CallbackAdapter, content: Any) -> Iterator[Any]:
        events.append("begun")
        try:
            yield from groups(adapter, content)
        finally:
            events.append("over")

    monkeypatch.setattr(CallbackAdapter, "_groups", watched)
    loader = Loader()
    for seed in (2, 3):
        stage.register(seed)
    first = loader.adapter(Kept())
    stage.play(2, APPLY, PUBLISH, adapter=first)
    events.clear()
    loader.failing_call = len(loader.calls) + 3
    assert stage.play(3, APPLY, adapter=loader.adapter(first.keep()))[0] == "kept"
    assert events == ["begun", "over", "begun", "over"]


def test_a_loader_is_not_called_for_bytes_that_are_wrong(stage: Stage) -> None:
    loader = Loader()
    path = stage.register(2)
    spoil(path, -1)
    state, _, error = stage.play(2, APPLY, adapter=loader.adapter(Kept()))
    assert (state, loader.calls) == ("kept", [])
    assert "VerificationError" in error


# Which mode


def make_source(tmp_path: Path) -> SafetensorsSource:
    return SafetensorsSource([save(tmp_path / "w.safetensors", seed=1)])


@pytest.mark.parametrize("budget_bytes", [5 << 20, 4 << 20])
def test_memory_decides_between_the_modes(tmp_path: Path, budget_bytes: int) -> None:
    """The version has 4 MiB and a bit."""
    streams, store = Streams(), Store(budget_bytes=budget_bytes)
    streams.register("v", make_source(tmp_path), store, mode="auto", pooled=False)
    stream = streams.get("v")
    if budget_bytes > 4 << 20:
        assert (stream, store.labels) == (None, ["v"])
    else:
        assert stream is not None
        assert store.labels == []
        assert "4.2 MB do not fit in the 4.2 MB left of the budget" in stream.why
    store.close()


def test_memory_that_will_be_used_again_counts_as_free(tmp_path: Path) -> None:
    streams, store = Streams(), Store(budget_bytes=10 << 20)
    for number in range(4):
        label = f"step-{number}"
        streams.register(label, make_source(tmp_path), store, mode="auto", pooled=True)
    assert streams.get("step-3") is None
    store.close()


def test_a_host_keeps_two_copies_or_streams(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_bytes = digest_in_place(make_source(tmp_path)).num_bytes
    store = Store()
    for free_bytes, lacks in ((2 * num_bytes, False), (2 * num_bytes - 1, True)):
        monkeypatch.setattr("checkpoint_engine.store.available_bytes", lambda n=free_bytes: n)
        assert bool(store.lack(num_bytes, pooled=False)) == lacks


def test_tensors_in_memory_are_staged_or_refused() -> None:
    streams, store = Streams(), Store(budget_bytes=1 << 20)
    large = {"w": torch.zeros(1 << 20)}
    with pytest.raises(StoreError, match="budget"):
        streams.register("v", TensorSource(large), store, mode="auto", pooled=False)
    with pytest.raises(UsageError, match="only files can be streamed"):
        streams.register("v", TensorSource(large), store, mode="streamed", pooled=False)


def test_a_label_is_taken_once_in_whichever_mode(tmp_path: Path) -> None:
    streams, store = Streams(), Store()
    for label, mode in (("a", "streamed"), ("b", "staged")):
        streams.register(label, make_source(tmp_path), store, mode=mode, pooled=False)
        for other in ("streamed", "staged"):
            with pytest.raises(StoreError, match="already registered"):
                streams.register(label, make_source(tmp_path), store, mode=other, pooled=False)
    store.close()


def test_a_place_beyond_the_file_is_no_promise(tmp_path: Path) -> None:
    """A rank may lie about where tensors lie; reading would find out too late."""
    source = make_source(tmp_path)
    manifest = digest_in_place(source)
    ((file, descriptor),) = source.files.opened
    (large,) = (meta for meta in manifest.tensors if meta.name == "large")
    for position in (file.num_bytes, -1):
        file.positions["large"] = position
        content = Streamed(manifest, TensorFiles([file], [os.dup(descriptor)]))
        with byte_workers() as pool, pytest.raises(SourceError, match="'large' lies beyond"):
            content.verify(pool)
        with pytest.raises((SourceError, VerificationError)):
            content.chunk(large, 0, 4 << 20)()


def test_a_tensor_that_no_file_holds_is_refused_while_serving(stage: Stage) -> None:
    source = SafetensorsSource([save(stage.folder / "2.safetensors", 2)])
    manifest = digest_in_place(source)
    ((file, descriptor),) = source.files.opened
    del file.positions["mean"]
    files = TensorFiles([file], [os.dup(descriptor)])
    version = Version(label="v", digest=manifest.digest)
    with pytest.raises((SourceError, AdapterError), match="'mean'"):
        stage.adapter.prepare(Streamed(manifest, files), version)
