"""What all processes of a trainer make together, step by step, while the first one sends it.

The first says what is made next, once it is sure that nobody has left: who claims a step first says
whether all make it, or none. So nobody waits in a collective for one who has given up.

    steps = Steps(keys, number=1)       # of one call, by the same number in every process
    if steps.claim():                   # the first process
        steps.tell(Step(kind="weights"))
    for name, tensor in made(model, steps.next(timeout_seconds), timeout_seconds): ...  # the others
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import msgspec
import torch

from checkpoint_engine.adapters.attached import config_tensor
from checkpoint_engine.errors import DeadlineExceeded, PeerLost, RemoteError, UsageError
from checkpoint_engine.sources.lora import adapter_weights, base_weights, merged_weights
from checkpoint_engine.sources.lora_adapter import CONFIG_NAME
from checkpoint_engine.sources.training import inner_model, named_weights
from checkpoint_engine.streaming.messages import with_sender
from checkpoint_engine.streaming.orders import PATIENCE, Ending
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.protocol import decode

__all__ = ["Step", "Steps", "Wanted", "Weights", "beside", "made", "what_to_send"]

Weights = Iterator[tuple[str, torch.Tensor]]


class Wanted(NamedTuple):
    """What `CheckpointEngineManager.sync_weights` was asked for, in every process alike.

    Attributes:
        merge_and_sync: as there.
        adapter_name: as there.
        label: as there.
        number: of the call.
    """

    merge_and_sync: bool
    adapter_name: str | None
    label: str
    number: int


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What the first process tells the others: what to make next, or how it ended.

    Attributes:
        kind: of an `Order`.
        adapter: its name, as there.
        to: the rank in `torch.distributed` that gets the tensors, which is the first process's.
        ending: of the call; then there is nothing to make.
    """

    kind: str = ""
    adapter: str = ""
    to: int = 0
    ending: Ending | None = None


class Steps:
    """What is made in one call, by all processes of a trainer in step.

    Whoever claims the next one first says whether it is made by all, or left by all.

    Args:
        keys: which the first process keeps.
        number: of the call, the same in every process.
    """

    def __init__(self, keys: Rendezvous, number: int) -> None:
        self.keys = keys.scope(f"steps {number}")
        self._log, self._num_past = self.keys.log("steps"), 0

    def claim(self) -> bool:
        """The first process: whether nobody has left before the next one, which all make then."""
        return self.keys.add(f"claim {self._num_past + 1}", 1) == 1

    def leave(self) -> bool:
        """Another process: whether the next one was not claimed, so that nobody makes it."""
        return self.keys.add(f"claim {self._num_past + 1}", 2) % 2 == 0

    def tell(self, step: Step) -> None:
        """Say what is made; an ending needs no claim."""
        self._log.append(msgspec.msgpack.encode(step))
        self._num_past += 1

    def fail(self, error: BaseException) -> None:
        """Say that there is nothing to make, if anybody is left to be told."""
        with contextlib.suppress(PeerLost, DeadlineExceeded):
            self.tell(Step(ending=Ending(error=RemoteError.of(error))))

    def next(self, timeout_seconds: float) -> Step:
        """Hear what is made; raises DeadlineExceeded if nothing was said in time."""
        with with_sender():
            step: Step = decode(self._log.next(timeout_seconds), Step)
        self._num_past += 1
        return step


@contextlib.contextmanager
def beside(keys: Rendezvous, number: int) -> Iterator[Steps]:
    """The steps of a call that is refused, while another is under way over these keys."""
    forked = keys.fork()
    try:
        yield Steps(forked, number)
    finally:
        forked.give_back()


def what_to_send(model: torch.nn.Module, wanted: Wanted) -> tuple[str, str]:
    """The kind of an `Order`, and the adapter's name; "" for those that are active.

    Raises:
        UsageError: the model has no such adapter, or none at all.
    """
    adapter_name, found = wanted.adapter_name, cast(Any, inner_model(model))
    if not hasattr(found, "peft_config"):
        if wanted.merge_and_sync and adapter_name is None:
            return "weights", ""
        raise UsageError(
            f"a {type(found).__name__} has no adapters: wrap it with peft, or sync with "
            "merge_and_sync=True and no adapter_name"
        )
    names = list(found.peft_config)
    if adapter_name is not None and adapter_name not in names:
        raise UsageError(f"there is no adapter {adapter_name!r}; the model has {names}")
    if wanted.merge_and_sync:
        return "merged", adapter_name or ""
    active = list(found.active_adapters)
    if adapter_name is None and len(active) != 1:
        raise UsageError(f"say which adapter to send by adapter_name=: {active} are active")
    return "adapter", adapter_name or active[0]


def made(model: torch.nn.Module, step: Step, timeout_seconds: float) -> Weights:
    """The tensors of a step; on the trainer's first process alone, and made by all.

    Samplers that take them slowly have their deadline before the processes that gather have theirs.
    """
    options: dict[str, Any] = {"to": step.to, "timeout_seconds": PATIENCE * timeout_seconds}
    if step.kind == "weights":
        return named_weights(model, **options)
    if step.kind == "merged":
        adapters = [step.adapter] if step.adapter else None
        return merged_weights(model, adapters=adapters, **options)
    if step.kind == "base":
        return base_weights(model, **options)
    return _with_config(model, step.adapter, options)


def _with_config(model: torch.nn.Module, adapter: str, options: dict[str, Any]) -> Weights:
    yield from adapter_weights(model, adapter, **options)
    yield CONFIG_NAME, config_tensor(model, adapter)
