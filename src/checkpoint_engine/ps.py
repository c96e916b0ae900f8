"""The parameter server: weights at rest, pushed into the engines beside its ranks.

A drop-in for MoonshotAI's class of this name. What is new lies behind it: an update is one
transaction over all engines, verified and rolled back as one, and ends with a report.

    ps = ParameterServer()                                    # one rank; or all of torchrun's
    ps.register_checkpoint("step-120", named_tensors=model.state_dict())
    ps.gather_metas("step-120")
    report = ps.update("step-120", req_func)                  # raises unless published
    ps.unregister_checkpoint("step-120")

`req_func` is called with every rank's (device uuid, handle) and makes an engine call
`worker.update_weights_from_ipc` with its handle. It may be a list, one for each engine that this
rank calls, as `calls.engine_requests` makes it.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import msgspec

from checkpoint_engine.calls import request_inference_to_update
from checkpoint_engine.device_utils import device_uuid, local_index
from checkpoint_engine.errors import DeadlineExceeded, UpdateFailed, UsageError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.registry import Registry, state_dir
from checkpoint_engine.sources import JoinedSource, Source
from checkpoint_engine.sources.lora_adapter import is_lora
from checkpoint_engine.store import Store
from checkpoint_engine.transport.group_store import GroupStore
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.transport.sockets import own_host
from checkpoint_engine.update.back import roll_back, watched
from checkpoint_engine.update.conductor import Calls, Request
from checkpoint_engine.update.coordinator import Policy
from checkpoint_engine.update.ending import check_report_file, ended
from checkpoint_engine.update.group import Group, chosen_of
from checkpoint_engine.update.lora import check_kind, lora_calls, unload
from checkpoint_engine.update.metas import decode_metas
from checkpoint_engine.update.probe import Probe
from checkpoint_engine.update.protocol import Report, decode
from checkpoint_engine.update.sessions import Door
from checkpoint_engine.update.shelf import Shelf
from checkpoint_engine.update.streaming import Streams, check_modes
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["ParameterServer", "request_inference_to_update"]

SETTLE_SECONDS = 0.1


class ParameterServer:
    """One rank of a parameter server. All ranks call the same methods in the same order.

    Args:
        rank: this rank; default `$RANK`, else 0.
        world_size: number of ranks; default `$WORLD_SIZE`, else 1.
        auto_pg: meet the other ranks when needed; if False, `init_process_group` must come first.
        gpu_count: devices of this host, to number this rank's; default: all that are found.
        mem_fraction: accepted for compatibility; updates are staged in host memory.
        master_addr: where rank 0 is; default `$MASTER_ADDR`. If it is on another host, every rank
            needs the same `$CKPT_ENGINE_SECRET`.
        master_port: a free port there; default torchrun's own, else `$MASTER_PORT` + 1.
    """

    def __init__(
        self,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        auto_pg: bool = True,
        gpu_count: int | None = None,
        mem_fraction: float | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> None:
        if mem_fraction is not None:
            warnings.warn(
                "mem_fraction has no effect: updates are staged in host memory", stacklevel=2
            )
        self._rendezvous = Rendezvous.of_environment(rank, world_size, master_addr, master_port)
        self._auto_pg, self._gpu_count = auto_pg, gpu_count
        self._store = Store.of_environment()
        self._streams = Streams()
        self._door = Door(self._store.segment, self._streams.files)
        self._shelf = Shelf(self._store)
        self._lock = threading.Lock()
        self._registry: Registry | None = None
        self._groups: dict[tuple[int, ...], Group] = {}
        self._group_stores: list[GroupStore] = []
        self._version: Version | None = None
        self._name: str | None = None
        self._mode = "auto"

    @property
    def rank(self) -> int:
        """This rank."""
        return self._rendezvous.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._rendezvous.world_size

    def register_checkpoint(
        self,
        checkpoint_name: str,
        *,
        files: Sequence[str | os.PathLike[str]] | None = None,
        named_tensors: Mapping[str, Any] | None = None,
        use_shared_memory_pool: bool = False,
        use_inplace_pin_memory: bool = False,
        mode: str = "auto",
    ) -> None:
        """Copy this rank's shard of a checkpoint into host memory, and digest it.

        The files may go, and the tensors change, once this returns. Unless it is streamed: then
        nothing is copied, files stay open, and nobody may write into them; they may be deleted.

        Args:
            checkpoint_name: what to call it; also its weight version unless `update` says else.
            files: safetensors files.
            named_tensors: on any device; of those sharded over ranks, this one keeps a share.
            use_shared_memory_pool: keep the memory for the next such checkpoint, faulted in, and
                let go of all but the last two by itself. For a trainer's loop.
            use_inplace_pin_memory: take over files in /dev/shm, which need no second copy then and
                are gone when this returns, or fails once it reads them. They must be this user's,
                and open nowhere else. Their bytes move to sealed memory, which workers pin.
            mode: "staged" copies; "streamed" has engines read files while requests wait; "auto"
                streams what does not fit in memory, if it is in files.

        Raises:
            UsageError: there is no such mode, or tensors were to be streamed.
            SourceError: a file or tensor is not what it claims; nothing remains registered.
            StoreError: the name is taken, or memory does not suffice.
        """
        source = JoinedSource(files or (), named_tensors or {}, take=use_inplace_pin_memory)
        pooled = use_shared_memory_pool
        self.register_source(checkpoint_name, source, pooled=pooled, mode=mode)

    def register_source(
        self, checkpoint_name: str, source: Source, *, pooled: bool = False, mode: str = "auto"
    ) -> None:
        """Register this rank's shard from any source, which is taken over; else as above."""
        self._streams.register(checkpoint_name, source, self._store, mode=mode, pooled=pooled)

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> None:
        """Forget a checkpoint. Its memory is returned once no update and no replica needs it.

        Args:
            checkpoint_name: what it was registered as.
            force: also return the memory that the shared pool keeps for reuse.

        Raises:
            StoreError: there is none of that name.
        """
        if not self._streams.unregister(checkpoint_name):
            self._shelf.forget(self._store[checkpoint_name].segment.name)
            self._store.unregister(checkpoint_name, force=force)
        if self._name == checkpoint_name:
            self._version = self._name = None

    def init_process_group(
        self, *, master_port: int | None = None, timeout: timedelta = timedelta(minutes=10)
    ) -> None:
        """Make torch's default process group of these ranks (gloo) for the caller's own use.

        It meets in the ranks' own key store, and lasts until `close` at most. The parameter
        server's transfers use a group of their own. An existing group is kept.
        `master_port` is accepted for compatibility; the ranks have met already.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            store = self._rendezvous.group_store(f"default/{len(self._group_stores)}")
            self._group_stores.append(store)
            dist.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
            )
        self._auto_pg = True

    def gather_metas(self, checkpoint_name: str) -> None:
        """Tell all ranks what each has registered under this name.

        If nobody has registered any there is nothing to update from before `load_metas`.

        Raises:
            UsageError: ranks registered different tensors under one name.
            ProtocolError, ManifestError: what a rank told is malformed or contradicts itself.
            DeadlineExceeded: a rank did not come.
        """
        metas = self._gather(checkpoint_name, self._rendezvous)
        check_modes(metas)
        self._version, self._name, self._mode = None, checkpoint_name, "auto"
        if any(meta.manifest.tensors for meta in metas):
            self._version = Version.of(metas)
            if not is_lora(self._version.manifest):  # which no new instance could start from
                self._shelf.offer(checkpoint_name, self._version)

    def _gather(self, checkpoint_name: str | None, rendezvous: Rendezvous) -> list[RankMeta]:
        registered = checkpoint_name in self._store.labels
        shard = self._store[checkpoint_name] if checkpoint_name and registered else None
        stream = self._streams.get(checkpoint_name)
        known = shard or stream
        meta = RankMeta(
            rank=self.rank,
            host=own_host(),
            address=self._door.address,
            device_uuid=device_uuid(index=local_index(self.rank, self._gpu_count)),
            segment=shard.segment.name if shard else "",
            manifest=known.manifest if known else Manifest.of(()),
            peer=self._shelf.peer,
            files=stream.name if stream else "",
            why=stream.why if stream else "",
        )
        encoded = rendezvous.gather("metas", msgspec.msgpack.encode(meta), 600.0)
        return [decode(one, RankMeta) for one in encoded]

    def get_metas(self) -> dict[int, Any]:
        """What every rank registered, as plain data: JSON and any other encoding keep it."""
        version = self._gathered()
        return {meta.rank: msgspec.to_builtins(meta) for meta in version.sources}

    def load_metas(
        self, metas: Mapping[int, Any] | Mapping[str, Any], *, mode: str = "auto"
    ) -> None:
        """Take what `get_metas` gave, here or in another server; JSON may have made its keys text.

        What another server has is read from its ranks by the next `update`, as from peers.

        Args:
            metas: as `get_metas` gave them.
            mode: "staged" reads once, into memory; "streamed" has each engine read for itself while
                requests wait; "auto" streams where memory lacks to stage.

        Raises:
            ManifestError: it is malformed or contradicts itself.
        """
        decoded = decode_metas(metas)
        version = Version.of(decoded)
        if self._is_own(version) and len(decoded) != self.world_size:
            raise UsageError(f"these are the metas of {len(decoded)} of {self.world_size} ranks")
        self._version, self._name, self._mode = version, None, mode

    def update(
        self,
        checkpoint_name: str,
        req_func: Request | Sequence[Request],
        *,
        timeout: timedelta = timedelta(minutes=10),
        ranks: Sequence[int] | None = None,
        weight_version: str | None = None,
        on_failure: str = "rollback",
        min_replicas: int = 1,
        require_rollback: bool = False,
        base: str | None = None,
        lora: str | None = None,
        probe: Probe | Callable[[], object] | None = None,
        report: str | os.PathLike[str] | None = None,
    ) -> Report:
        """Bring the engines to a gathered checkpoint, all of them or none.

        Args:
            checkpoint_name: what `gather_metas` was called with.
            req_func: makes an engine take the update; runs in a thread once all ranks have staged
                and returns at once on ranks that lead no engine. If it raises, its engine says no.
                A function of a single rank may call several engines, which are given 0.2 s to say
                hello after each other; of a list, each calls one, so nobody is waited for in vain.
            timeout: until every engine is ready. Requests wait for a much shorter time.
            ranks: whose engines to update; these read from the others as peers, who take no part
                and need not call this. Default all, who broadcast to each other.
            weight_version: the label that the engines will show; default `checkpoint_name`.
            on_failure: "rollback", or "quarantine" to go on without the engines that fail.
            min_replicas: with "quarantine", how many engines must be left.
            require_rollback: refuse engines that would have no way back.
            base: digest of the version that every engine must serve; else the update is refused.
            lora: what requests call the adapter by, if the checkpoint is one: see `update.lora`.
            probe: asked for a while after publish, on rank 0; if it says no, the engines return to
                the version before. A bare function is asked once a second for ten seconds.
            report: file to write the report to, as JSON, on rank 0.

        Returns:
            The report, the same on every rank that takes part; on the others its outcome is
            "not_taking_part".

        Raises:
            UpdateFailed: nothing was published, or the probe said no; every engine serves what it
                served before, unless the report says otherwise. Names the first cause.
            UsageError: the checkpoint was not gathered.
        """
        policy = Policy(on_failure, min_replicas, require_rollback)
        seconds = timeout.total_seconds()
        calls = Calls.of(req_func)
        if lora is not None:
            calls = lora_calls(lora, req_func, policy, probe, seconds)
        check_report_file(report)
        chosen = chosen_of(ranks, self.world_size)
        if self.rank not in chosen:
            return Report.not_taking_part(weight_version or checkpoint_name)
        with self._lock, self._store.leased(checkpoint_name):
            group, version = self._group(chosen), self._gathered(checkpoint_name)
            check_kind(version.manifest, lora)
            if ranks is not None or not self._is_own(version):
                metas = self._taking_part(version, chosen, group)
                version = group.read_from_peers(version, metas, self._mode)
            elif not self._auto_pg and len(version.hosts.names) > 1:
                raise UsageError("auto_pg is off: call init_process_group before update")
            result = group.conduct(
                version,
                weight_version or checkpoint_name,
                calls,
                policy=policy,
                timeout_seconds=seconds,
                base=base,
                lora=lora,
            )
            if probe is not None and result.outcome == "published":
                asked = probe if isinstance(probe, Probe) else Probe(probe)
                result = watched(group, result, asked, version.metas, calls, seconds)
        return ended(result, report if self.rank == 0 else None)

    def unload_lora(
        self,
        lora: str,
        requests: Sequence[Request],
        *,
        timeout: timedelta = timedelta(minutes=2),
        report: str | os.PathLike[str] | None = None,
    ) -> Report:
        """Have the engines let go of a LoRA adapter, all of them or none. Nothing need be gathered.

        Args:
            lora: what requests call it by.
            requests: as `engine_requests` makes them.
            timeout: until every engine is ready, and again for requests that use the adapter.
            report: file to write the report to, as JSON, on rank 0.

        Raises:
            UpdateFailed: an engine has no such adapter, say; all serve what they served before.
        """
        check_report_file(report)
        seconds = timeout.total_seconds()
        calls = lora_calls(lora, requests, Policy(), None, seconds)
        with self._lock:
            group = self._group(range(self.world_size))
            result = unload(group, lora, self._gather(None, self._rendezvous), calls, seconds)
        return ended(result, report if self.rank == 0 else None)

    def rollback(
        self,
        req_func: Request | Sequence[Request],
        *,
        to: str | None = None,
        timeout: timedelta = timedelta(minutes=10),
        report: str | os.PathLike[str] | None = None,
    ) -> Report:
        """Return the engines to a version that they still keep, all of them or none.

        Each engine keeps the version that it served before the present one, so nothing is read or
        sent, no server of then needs to live, and a second rollback undoes the first. Nothing
        needs to be registered here; the registry says what was published.

        Args:
            req_func: as for `update`.
            to: label of a published version; default the one published before the last.
            timeout: until every engine is ready.
            report: file to write the report to, as JSON, on rank 0.

        Raises:
            UpdateFailed: an engine does not keep that version; nothing has changed.
            UsageError: no such version was published.
        """
        check_report_file(report)
        with self._lock:
            group = self._group(range(self.world_size))
            metas = self._gather(None, self._rendezvous)
            result = roll_back(group, to, metas, Calls.of(req_func), timeout.total_seconds())
        return ended(result, report if self.rank == 0 else None)

    def join(
        self,
        metas: Mapping[int, Any] | Mapping[str, Any],
        req_func: Request | Sequence[Request],
        *,
        mode: str = "auto",
        timeout: timedelta = timedelta(minutes=10),
        report: str | os.PathLike[str] | None = None,
    ) -> Report:
        """Bring engines to what another server has published, while that serves and updates.

        The weights are read from its ranks, who take no part. If it publishes another version
        meanwhile, the engines are brought to that one; they end on the last.

        Args:
            metas: what that server's `get_metas` gave, at any time since it started.
            req_func: as for `update`.
            mode: as for `load_metas`.
            timeout: for all of it.
            report: file to write the last report to, as JSON, on rank 0.

        Raises:
            TransferError: no rank of that server answers, or it has nothing.
            UpdateFailed: as for `update`.
            DeadlineExceeded: it published faster than the engines could follow.
        """
        deadline = time.monotonic() + timeout.total_seconds()
        self.load_metas(metas, mode=mode)
        sources, group = self._gathered().sources, self._group(range(self.world_size))
        result: Report | None = None
        has_tried = False
        while time.monotonic() < deadline:
            found = group.ask(sources)
            if has_tried and found.updating:
                time.sleep(SETTLE_SECONDS)
                continue
            if result is not None and (result.version, result.digest) == found.name:
                return result
            self._version, self._name = Version.of(found.metas), found.label
            left, has_tried = timedelta(seconds=deadline - time.monotonic()), True
            try:
                result = self.update(found.label, req_func, timeout=left, report=report)
            except UpdateFailed:
                now = group.ask(sources)
                # Else its memory was gone already, or its update has these engines at the moment.
                if now.name == found.name and not (found.updating or now.updating):
                    raise
                result = None
        raise DeadlineExceeded("the other server publishes faster than these engines can follow")

    def store_based_barrier(self, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Wait for all ranks; needs no process group, and may be called any number of times.

        Raises:
            DeadlineExceeded: a rank did not come.
        """
        self._rendezvous.barrier("user", timeout.total_seconds())

    def close(self) -> None:
        """Stop listening and return all memory that no replica maps.

        Rank 0 waits a few seconds for the others to close too: they may still need what it keeps.
        """
        self._door.close()
        self._shelf.close()
        self._streams.close()
        self._store.close()
        for group in self._groups.values():
            group.close()
        if self._registry is not None:
            self._registry.close()
        for store in self._group_stores:
            store.close()
        self._rendezvous.close()

    def _group(self, ranks: Sequence[int]) -> Group:
        """The group of these ranks, of which this is one; it counts its updates."""
        key = tuple(ranks)
        if key not in self._groups:
            rendezvous = self._rendezvous
            if len(key) < self.world_size:
                rendezvous = rendezvous.subset(key)
            self._groups[key] = Group(
                rendezvous, self._store, self._door, self._shelf, self._open_registry
            )
        return self._groups[key]

    def _is_own(self, version: Version) -> bool:
        return self._door.address in [meta.address for meta in version.sources]

    def _taking_part(
        self, version: Version, ranks: Sequence[int], group: Group
    ) -> Sequence[RankMeta]:
        """The metas of those who read; beside another server's version these ranks' are new."""
        if self._is_own(version):
            return [version.sources[rank] for rank in ranks]
        return self._gather(None, group.rendezvous)

    def _gathered(self, checkpoint_name: str | None = None) -> Version:
        named_otherwise = checkpoint_name and self._name and checkpoint_name != self._name
        if self._version is None or named_otherwise:
            raise UsageError(
                f"checkpoint {checkpoint_name or ''!r} was not gathered: register it, and call "
                "gather_metas with its name on every rank first"
            )
        return self._version

    def _open_registry(self) -> Registry:
        if self._registry is None:
            self._registry = Registry(state_dir() / "registry.sqlite")
        return self._registry
