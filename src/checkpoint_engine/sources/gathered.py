"""Weights that are gathered while they are read: the parameter server's view of a training model.

Every rank registers a share of the model, and takes part in gathering all of it. A thread gathers
bucket after bucket, in the order in which the store reads; what is this rank's waits until it has
been read, what is another's is only passed on. So each rank has one bucket in memory beside the
store, and never two.

    source = GatheredSource(weights_of(model))  # on every rank
    ps.register_source("step-120", source)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from checkpoint_engine.device_utils import same_stream
from checkpoint_engine.errors import DeadlineExceeded, SourceError
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES
from checkpoint_engine.plan.layout import TensorSpec
from checkpoint_engine.sources.tensors import copy_bytes, wait_until_made
from checkpoint_engine.sources.training import (
    TIMEOUT_SECONDS,
    Keeper,
    kept,
    share_out,
    stream,
)
from checkpoint_engine.sources.weight import Weight

__all__ = ["GatheredSource"]


class GatheredSource:
    """This rank's share of the weights of a model in training.

    Whoever is sharded over ranks must be registered by all of them at the same time. The model
    must not change until each has closed its source, which waits for the others. What is not
    sharded is every rank's: those that register it alike share it.

    Args:
        weights: the same on every rank of their meshes.
        keeper: who gets which bucket; default all ranks in turn.
        bucket_bytes: full tensors that are gathered at once.
        timeout_seconds: for each message, for a rank that is late, and for the reader.
    """

    def __init__(
        self,
        weights: Sequence[Weight],
        *,
        keeper: Keeper = share_out,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self._weights = _in_order_of_names(weights)
        self._num_weights = len(self._weights)
        self._keeper, self._bucket_bytes = keeper, bucket_bytes
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._ready: dict[str, torch.Tensor] = {}
        self._unread: dict[str, int] = {}
        self._closed = False
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._enter_stream = same_stream()

    @property
    def files(self) -> None:
        """None: these tensors lie in memory, here and elsewhere."""
        return None

    @property
    def on_gpu(self) -> bool:
        """Whether some are gathered on a GPU."""
        return any(part.is_cuda for weight in self._weights for part in weight.parts)

    @property
    def freed_bytes(self) -> int:
        """None: the tensors stay where they are."""
        return 0

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors that this rank keeps."""
        weights = kept(self._weights, self._keeper, self._bucket_bytes)
        return [spec for weight in weights for spec in weight.specs]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Copy bytes of a tensor as soon as it is there; each byte can be read once.

        Raises:
            SourceError, TransferError: as `named_weights`.
            DeadlineExceeded: it did not come in time.
        """
        self._begin()
        with self._changed:
            self._changed.wait_for(lambda: name in self._ready or self._is_over, self._timeout())
            if self._error is not None:
                raise self._error
            if name not in self._ready:
                raise DeadlineExceeded(f"tensor {name!r} was not gathered: it is read out of order")
            tensor = self._ready[name]
        copy_bytes(tensor, start, out)
        del tensor
        with self._changed:
            self._unread[name] -= len(out)
            if not self._unread[name]:
                del self._unread[name], self._ready[name]
                self._changed.notify_all()

    def close(self) -> None:
        """Drop what was not read, and let the other ranks finish; may be called twice."""
        self._begin()
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._unread.clear()
            self._changed.notify_all()
        assert self._thread is not None
        self._thread.join(self._timeout())

    @property
    def _is_over(self) -> bool:
        return self._closed or self._error is not None

    def _timeout(self) -> float:
        """Seconds until the thread has failed or is done: each of its messages has a deadline."""
        return self._timeout_seconds * (self._num_weights + 1)

    def _begin(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            self._enter_stream()
            self._gather()
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        self._weights = []

    def _gather(self) -> None:
        for bucket in stream(
            self._weights, self._keeper, self._bucket_bytes, self._timeout_seconds
        ):
            ready = {
                spec.names[0]: tensor.contiguous()
                for weight, tensors in bucket
                for spec, tensor in zip(weight.specs, tensors, strict=True)
                if tensor.numel()
            }
            bucket.clear()
            wait_until_made(ready.values())
            with self._changed:
                if not self._closed:
                    self._unread = {name: tensor.nbytes for name, tensor in ready.items()}
                    self._ready = ready
                    self._changed.notify_all()
                ready = {}
                is_read = self._changed.wait_for(
                    lambda: self._closed or not self._ready, self._timeout_seconds
                )
            if not is_read:
                raise SourceError("nobody reads what was gathered: read in the order of names")


def _in_order_of_names(weights: Sequence[Weight]) -> list[Weight]:
    """As the store reads them (`plan.layout`); those whose tensors alternate are put together."""
    ordered: list[list[Weight]] = []
    last = ""
    for weight in sorted(weights, key=lambda weight: min(_names(weight))):
        if ordered and min(_names(weight)) < last:
            ordered[-1].append(weight)
        else:
            ordered.append([weight])
        last = max(last, *_names(weight))
    return [Weight.together(group) for group in ordered]


def _names(weight: Weight) -> list[str]:
    return [spec.names[0] for spec in weight.specs]
