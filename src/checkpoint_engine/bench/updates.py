"""Updates on one host, next to plain copies of the same tensors and to files.

A trainer's model, a model to copy into and a parameter server live in this process; a replica
serves in another. Whatever is written into exists before the clock starts: parameters are filled,
store memory is pooled, the file system is a tmpfs. What is sent is new in every round.

    with Updates(SIZES["full"], folder) as updates:
        samples = run_rounds(updates.operations(), ...)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file, save_file

from checkpoint_engine.adapters.live import LiveModel, Plan, write
from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.bench.joiner import joiner_process
from checkpoint_engine.bench.measure import Operation, Stopwatch
from checkpoint_engine.bench.replica import replica_process
from checkpoint_engine.bench.weights import Size, make_model, parameters, save_folder
from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import VerificationError
from checkpoint_engine.memory import byte_workers
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Store
from checkpoint_engine.transport.handover import Attachments, Part
from checkpoint_engine.update.protocol import Report
from checkpoint_engine.update.sessions import Door

__all__ = ["STAGES", "Updates"]

STAGES = ("stage", "attach", "verify", "enter", "apply", "check", "publish")
"""What follows one another in an update. `resume` is a part of `publish`."""


class Updates:
    """Everything that the operations need; enter it to make it, leave it to free it.

    Args:
        size: of the model.
        folder: an empty folder on a tmpfs.
    """

    def __init__(self, size: Size, folder: Path) -> None:
        self._size, self._folder = size, folder
        self._stack = ExitStack()
        self._may_return = False  # once a version was published

    def __enter__(self) -> Updates:
        with ExitStack() as stack:
            save_folder(self._size, self._folder)
            endpoint = stack.enter_context(replica_process(self._folder))
            self._trainer, self._model = make_model(self._size, 0), make_model(self._size, 1)
            self._server = ParameterServer(rank=0, world_size=1)
            stack.callback(self._server.close)
            self._requests = engine_requests([endpoint], rank=0, world_size=1)
            self._labels = (f"step-{number}" for number in itertools.count())
            self._joiner = stack.enter_context(joiner_process(endpoint))
            self._file = self._folder / "model.safetensors"
            save_file(self._tensors_of_file(), self._file)
            self._plan = self._stage_here(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def num_bytes(self) -> int:
        """Bytes of the model, tied tensors once."""
        return sum(tensor.nbytes for tensor in parameters(self._model))

    def operations(self) -> list[Operation]:
        """What a round consists of."""
        return [
            Operation(frozenset({"copy"}), lambda: self._copy("copy")),
            Operation(frozenset({"apply"}), self._apply),
            Operation(frozenset({"files"}), self._through_files),
            Operation(frozenset({"register", "update", "pause", "rollback"}), self._update),
            Operation(frozenset({"register and update"}), self._update_from_tensors),
            Operation(frozenset({"join"}), self._join),
            Operation(frozenset({"copy again"}), lambda: self._copy("copy again")),
        ]

    def _copy(self, name: str) -> Mapping[str, float]:
        """What there is at best: every tensor copied, with as many threads as torch has."""
        watch = Stopwatch()
        pairs = list(zip(parameters(self._model), parameters(self._trainer), strict=True))
        with watch.time(name):
            for target, source in pairs:
                target.copy_(source)
        return watch.seconds

    def _apply(self) -> Mapping[str, float]:
        """The copies that an update makes in its pause, without the digests."""
        watch = Stopwatch()
        with watch.time("apply"), byte_workers() as pool:
            write(self._plan, pool, digest=_undigested)
        return watch.seconds

    def _through_files(self) -> Mapping[str, float]:
        """The usual way: the trainer saves a file, and the engine loads it over its parameters."""
        self._train()
        tensors, targets = self._tensors_of_file(), dict(self._model.state_dict())
        watch = Stopwatch()
        with watch.time("files", "files/save"):
            save_file(tensors, self._file)
        with watch.time("files", "files/load and copy"):
            for name, tensor in load_file(self._file).items():
                targets[name].copy_(tensor)
        return watch.seconds

    def _update(self) -> Mapping[str, float]:
        """From the file of the last round to the replica, in two times: before and in `update`."""
        label = next(self._labels)
        watch = Stopwatch()
        with watch.time("register"):
            self._server.register_checkpoint(label, files=[self._file], use_shared_memory_pool=True)
        self._server.gather_metas(label)
        with watch.time("update"):
            report = self._server.update(label, self._requests)
        _check(report)
        assert report.pause_seconds is not None, "a published update had a pause"
        pauses = {"pause": report.pause_seconds}
        if self._may_return:
            back = self._server.rollback(self._requests)
            _check(back)
            pauses["rollback"] = back.pause_seconds or 0.0
        self._may_return = True
        stages = {f"update/{stage}": report.seconds.get(stage, 0.0) for stage in STAGES}
        rest = watch.seconds["update"] - sum(stages.values())
        return {
            **watch.seconds,
            **stages,
            "update/votes and calls": rest,
            **pauses,
        }

    def _update_from_tensors(self) -> Mapping[str, float]:
        """From the trainer's tensors to the replica."""
        self._train()
        label, tensors = next(self._labels), dict(self._trainer.state_dict())
        whole = "register and update"
        watch = Stopwatch()
        with watch.time(whole):
            with watch.time(f"{whole}/register"):
                self._server.register_checkpoint(
                    label, named_tensors=tensors, use_shared_memory_pool=True
                )
            self._server.gather_metas(label)
            with watch.time(f"{whole}/update"):
                report = self._server.update(label, self._requests)
        _check(report)
        return watch.seconds

    def _join(self) -> Mapping[str, float]:
        """Another process reads what was published last, and brings the replica to it."""
        self._update_from_tensors()
        return {"join": self._joiner(self._server.get_metas())}

    def _train(self) -> None:
        """Change every weight."""
        with torch.no_grad():
            for parameter in parameters(self._trainer):
                parameter.neg_()

    def _tensors_of_file(self) -> dict[str, torch.Tensor]:
        """The trainer's tensors as files hold them: tied ones once."""
        return {name: tensor.detach() for name, tensor in self._trainer.named_parameters()}

    def _stage_here(self, stack: ExitStack) -> Plan:
        """What a replica's adapter holds when it is ready, made in this process."""
        store = Store()
        stack.callback(store.close)
        door = Door(store.segment)
        stack.callback(door.close)
        shard = store.register("staged", TensorSource(dict(self._trainer.state_dict())))
        part = Part(
            address=door.address,
            segment=shard.segment.name,
            start=0,
            offset=0,
            length=shard.manifest.num_bytes,
        )
        staged = Staged.attach(shard.manifest, [part], Attachments(keep_maps=True))
        stack.callback(staged.release)
        return LiveModel(self._model).bind(staged)


def _undigested(pieces: Iterable[memoryview]) -> bytes:
    """Let the pieces be written, and no more."""
    for _ in pieces:
        pass
    return b""


def _check(report: Report) -> None:
    if not report.verified:
        raise VerificationError("the replica did not confirm the digest of what was sent")
