"""What a streaming engine is: how a trainer's weights reach its samplers, tensor by tensor.

The face is that of Twinkle's and verl's checkpoint engines, so that code written for those runs as
it is. One process sends, rank 0; the others receive.

    engine = GlooCheckpointEngine()                         # the trainer
    engine.is_master = True
    metadata = engine.prepare()
    engine.init_process_group(rank=0, world_size=3)
    await engine.send_weights(model.named_parameters())     # as often as there are new weights
    engine.finalize()

    engine = GlooCheckpointEngine()                         # each sampler
    engine.prepare()
    engine.init_process_group(rank=1, world_size=3, master_metadata=metadata)
    async for name, tensor in engine.receive_weights():
        load(name, tensor)
    engine.finalize()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import msgspec
import torch

from checkpoint_engine.errors import UsageError

__all__ = ["CheckpointEngine", "StreamReport", "Weights"]

Weights: TypeAlias = (
    Mapping[str, torch.Tensor]
    | Iterable[tuple[str, torch.Tensor]]
    | AsyncIterable[tuple[str, torch.Tensor]]
)
"""Names and tensors: a state dict, `named_parameters()`, or a generator of either kind."""


class StreamReport(msgspec.Struct, frozen=True, kw_only=True):
    """One version as it was sent, and taken by every receiver.

    Attributes:
        label: what it is called.
        digest: what it is, as `manifest.Version.digest`.
        num_tensors, num_buckets: of it.
        num_bytes: of its tensors.
        sent_bytes: to each receiver, padding included; fewer where compression paid.
        seconds: spent waiting for tensors ("generate"), for receivers to come ("meet"), copying
            and digesting ("fill") and for buckets to move, compressed or not ("move"); these
            overlap. "total" is from the call to its end.
    """

    label: str
    digest: str
    num_tensors: int
    num_buckets: int
    num_bytes: int
    sent_bytes: int
    seconds: dict[str, float]


class CheckpointEngine(ABC):
    """Moves weights from a trainer to samplers; one object in each process.

    Attributes:
        is_master: whether this process sends; set before `prepare`.
    """

    is_master: bool

    @abstractmethod
    def prepare(self) -> dict[str, Any]:
        """Get ready to meet. Returns what the others need to know of the master, else nothing."""

    @classmethod
    def build_topology(
        cls, trainer_world_size: int, rollout_world_size: int, metadata: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Who is which rank: the trainer's first process is rank 0, and samplers follow.

        A trainer's other processes are rank -1: they take part in making weights, not in sending.

        Args:
            trainer_world_size: processes of the trainer.
            rollout_world_size: processes that receive.
            metadata: what `prepare` returned, of all processes or of the master alone.

        Returns:
            The arguments of `init_process_group`, by name, for each trainer and each receiver.

        Raises:
            UsageError: none of them was the master.
        """
        of_master = next((dict(one) for one in metadata if one), None)
        if of_master is None:
            raise UsageError(
                "no engine was prepared as the master: set is_master = True on the trainer's "
                "first one before prepare()"
            )
        world_size = 1 + rollout_world_size

        def arguments(ranks: list[int]) -> dict[str, list[Any]]:
            return {
                "rank": ranks,
                "world_size": [world_size] * len(ranks),
                "master_metadata": [of_master] * len(ranks),
            }

        return (
            arguments([0] + [-1] * (trainer_world_size - 1)),
            arguments(list(range(1, world_size))),
        )

    @abstractmethod
    def init_process_group(
        self, rank: int, world_size: int, master_metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Meet: rank 0 sends, ranks from 1 receive, and -1 takes no part.

        Args:
            rank: of this process.
            world_size: of the sender and all receivers.
            master_metadata: what the master's `prepare` returned; without it `$MASTER_ADDR` and
                `$MASTER_PORT` say where it is.
        """

    @abstractmethod
    async def send_weights(self, weights: Weights) -> StreamReport | None:
        """Send one version to every receiver; returns when all have taken all of it."""

    @abstractmethod
    def receive_weights(self) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """The names and tensors of the next version, each as soon as it is here and checked."""

    @abstractmethod
    def finalize(self) -> None:
        """Leave, and let go of memory; `prepare` may begin anew. May be called twice."""
