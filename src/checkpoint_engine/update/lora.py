"""LoRA adapters in the transaction: as weights are, but for who takes them.

An adapter is a version of tensors, its configuration one of them (`sources.lora_adapter`), so it is
gathered, staged, verified and voted on by what does that for weights. Only its engines have no
session in their workers: that runs here, beside the rank that calls them (`adapters.lora`).

    server.register_source("sft-3", LoraSource.of_folder("./adapter"))
    server.gather_metas("sft-3")
    server.update("sft-3", engine_requests(...), lora="helper")      # or replace what is called so
    server.unload_lora("helper", engine_requests(...))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint_engine.adapters.lora import UNLOADED, LoraAdapter
from checkpoint_engine.adapters.lora_folders import LoraFolders, check_name
from checkpoint_engine.calls import EngineRequest
from checkpoint_engine.engines.base import LoraEngine
from checkpoint_engine.errors import AdapterError, UsageError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.sources.lora_adapter import is_lora
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.update import session
from checkpoint_engine.update.conductor import Calls, Request
from checkpoint_engine.update.coordinator import Policy
from checkpoint_engine.update.group import Group
from checkpoint_engine.update.protocol import Report
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["check_kind", "lora_calls", "unload"]

UNLOADED_LABEL = "unloaded"


@dataclass(frozen=True)
class _LoraRequest:
    """Makes one engine take a LoRA adapter, or let go of one."""

    request: EngineRequest
    name: str
    timeout_seconds: float

    def __call__(self, handles: Sequence[tuple[str, str]]) -> None:
        engine, endpoint = self.request.engine, self.request.endpoint
        if not isinstance(engine, LoraEngine):
            raise UsageError(
                f"{endpoint.url}: engines of kind {engine.name!r} take no LoRA adapters from here; "
                "those of vllm and sglang do"
            )
        (_, handle), *_ = handles[self.request.ranks]
        folders = LoraFolders.of_engine(endpoint.url)
        adapter = LoraAdapter(engine, endpoint, self.name, folders, self.timeout_seconds)
        with folders.locked():
            outcome = session.run(handle, adapter, Attachments(keep_maps=False))
        if outcome.error is not None:
            raise AdapterError(f"LoRA adapter {self.name!r} is {outcome.state}: {outcome.error}")


def lora_calls(
    name: str,
    requests: Request | Sequence[Request],
    policy: Policy,
    probe: object,
    timeout_seconds: float,
) -> Calls:
    """The calls of this rank's engines for a LoRA of this name.

    Raises:
        UsageError: the name is a path, what calls the engines is not of `engine_requests`, or
            something was asked for that only weights have.
    """
    check_name(name)
    if policy.on_failure != "rollback" or probe is not None:
        raise UsageError("with lora=, on_failure is 'rollback', and there is no probe")
    listed = [requests] if callable(requests) else list(requests)
    known = [request for request in listed if isinstance(request, EngineRequest)]
    if len(known) < len(listed):
        raise UsageError("LoRA adapters need engines called by `engine_requests`, not a function")
    made = tuple(_LoraRequest(request, name, timeout_seconds) for request in known)
    return Calls(made, open_ended=False)


def check_kind(manifest: Manifest | None, lora: str | None) -> None:
    """Raise UsageError if weights were to be a LoRA adapter, or an adapter weights."""
    if lora is None and is_lora(manifest):
        raise UsageError("this is a LoRA adapter, no model's weights: say lora=, what to call it")
    if lora is not None and not is_lora(manifest):
        raise UsageError("these are no LoRA adapter's tensors: register a LoraSource")


def unload(
    group: Group, name: str, metas: Sequence[RankMeta], calls: Calls, timeout_seconds: float
) -> Report:
    """Have every engine let go of a LoRA, or none."""
    nothing = Version.kept(UNLOADED, 0, metas)
    return group.conduct(nothing, UNLOADED_LABEL, calls, timeout_seconds=timeout_seconds, lora=name)
