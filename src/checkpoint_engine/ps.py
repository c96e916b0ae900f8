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
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec

from checkpoint_engine.calls import request_inference_to_update
from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.errors import ManifestError, UpdateFailed, UsageError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.registry import Registry, state_dir
from checkpoint_engine.sources import JoinedSource, Source
from checkpoint_engine.store import Store
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.transport.sockets import socket_dir
from checkpoint_engine.update.conductor import Conductor, Request
from checkpoint_engine.update.coordinator import Policy
from checkpoint_engine.update.protocol import Report, decode
from checkpoint_engine.update.sessions import Door
from checkpoint_engine.update.staging import RankMeta, Version

__all__ = ["ParameterServer", "request_inference_to_update"]


class ParameterServer:
    """One rank of a parameter server. All ranks call the same methods in the same order.

    Args:
        rank: this rank; default `$RANK`, else 0.
        world_size: number of ranks; default `$WORLD_SIZE`, else 1.
        auto_pg: meet the other ranks when needed; if False, `init_process_group` must come first.
        gpu_count: devices of this host, to number this rank's; default: all that are found.
        mem_fraction: accepted for compatibility; updates are staged in host memory.
        master_addr: where rank 0 is; default `$MASTER_ADDR`.
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
        self._store = Store(budget_bytes=_budget_bytes())
        self._door = Door(self._store.segment)
        self._lock = threading.Lock()
        self._registry: Registry | None = None
        self._collective: Collective | None = None
        self._version: Version | None = None
        self._name: str | None = None
        self._published: str | None = None
        self._num_updates = 0
        self._scopes: list[Rendezvous] = []

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
        use_inplace_pin_memory: bool = True,
    ) -> None:
        """Copy this rank's shard of a checkpoint into host memory, and digest it.

        The files may go, and the tensors change, once this returns.

        Args:
            checkpoint_name: what to call it; also its weight version unless `update` says else.
            files: safetensors files.
            named_tensors: tensors on any device.
            use_shared_memory_pool: keep the memory for the next such checkpoint, faulted in, and
                let go of all but the last two by itself. For a trainer's loop.
            use_inplace_pin_memory: accepted for compatibility; without a GPU nothing is pinned.

        Raises:
            SourceError: a file or tensor is not what it claims; nothing remains registered.
            StoreError: the name is taken, or memory does not suffice.
        """
        source = JoinedSource(files or (), named_tensors or {})
        self.register_source(checkpoint_name, source, pooled=use_shared_memory_pool)

    def register_source(
        self, checkpoint_name: str, source: Source, *, pooled: bool = False
    ) -> None:
        """Register this rank's shard from any source, which is closed; else as above."""
        try:
            self._store.register(checkpoint_name, source, pooled=pooled)
        finally:
            source.close()

    def unregister_checkpoint(self, checkpoint_name: str, force: bool = False) -> None:
        """Forget a checkpoint. Its memory is returned once no update and no replica needs it.

        Args:
            checkpoint_name: what it was registered as.
            force: also return the memory that the shared pool keeps for reuse.

        Raises:
            StoreError: there is none of that name.
        """
        self._store.unregister(checkpoint_name, force=force)
        if self._name == checkpoint_name:
            self._version = self._name = None

    def init_process_group(
        self, *, master_port: int | None = None, timeout: timedelta = timedelta(minutes=10)
    ) -> None:
        """Make torch's default process group of these ranks (gloo) for the caller's own use.

        The parameter server's transfers use a group of their own. An existing group is kept.
        `master_port` is accepted for compatibility; the ranks have met already.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            store = self._rendezvous.group_store("default")
            dist.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.world_size, timeout=timeout
            )
        self._auto_pg = True

    def gather_metas(self, checkpoint_name: str) -> None:
        """Tell all ranks what each has registered under this name.

        Raises:
            UsageError: ranks registered different tensors under one name, or nobody any.
            ProtocolError, ManifestError: what a rank told is malformed or contradicts itself.
            DeadlineExceeded: a rank did not come.
        """
        registered = checkpoint_name in self._store.labels
        shard = self._store[checkpoint_name] if registered else None
        meta = RankMeta(
            rank=self.rank,
            host=_host(),
            address=self._door.address,
            device_uuid=device_uuid(index=self._device_index()),
            segment=shard.segment.name if shard else "",
            manifest=shard.manifest if shard else Manifest.of(()),
        )
        encoded = self._rendezvous.gather("metas", msgspec.msgpack.encode(meta), 600.0)
        self._adopt(checkpoint_name, [decode(one, RankMeta) for one in encoded])

    def get_metas(self) -> dict[int, Any]:
        """What every rank registered, as plain data: JSON and any other encoding keep it."""
        version = self._gathered()
        return {meta.rank: msgspec.to_builtins(meta) for meta in version.metas}

    def load_metas(self, metas: Mapping[int, Any] | Mapping[str, Any]) -> None:
        """Take what `get_metas` gave, in this server of ranks; JSON may have made its keys text.

        Raises:
            ManifestError: it is malformed or contradicts itself.
            UsageError: it is another server's.
        """
        try:
            by_rank = msgspec.convert(metas, dict[int, RankMeta], strict=False)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            raise ManifestError(f"not what get_metas gives: {error}") from error
        decoded = [by_rank[rank] for rank in sorted(by_rank)]
        ranks = [meta.rank for meta in decoded]
        if ranks != list(range(self.world_size)):
            raise UsageError(f"these are the metas of ranks {ranks}, of {self.world_size} here")
        if decoded[self.rank].address != self._door.address:
            raise UsageError(
                "these are another parameter server's metas; gather_metas tells this one's"
            )
        self._adopt(self._name or "loaded", decoded)

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
            ranks: whose engines to update; default all. The others still send what they hold.
            weight_version: the label that the engines will show; default `checkpoint_name`.
            on_failure: "rollback", or "quarantine" to go on without the engines that fail.
            min_replicas: with "quarantine", how many engines must be left.
            require_rollback: refuse engines that would have no way back.
            report: file to write the report to, as JSON, on rank 0.

        Returns:
            The report; the same on every rank.

        Raises:
            UpdateFailed: nothing was published; every engine serves what it served before, unless
                the report says that it is torn or lost. Names the first cause.
            UsageError: the checkpoint was not gathered.
        """
        policy = Policy(on_failure, min_replicas, require_rollback)
        if report is not None and not Path(report).absolute().parent.is_dir():
            raise UsageError(f"{report}: the report's folder does not exist")
        requests = [req_func] if callable(req_func) else list(req_func)
        if ranks and self.rank not in ranks:
            requests = []
        with self._lock, self._leased(checkpoint_name):
            version = self._gathered(checkpoint_name)
            result = self._conduct(
                version, policy, requests, timeout, weight_version, open_ended=callable(req_func)
            )
            if result.outcome == "published":
                self._published = result.digest
        if report is not None and self.rank == 0:
            Path(report).write_bytes(msgspec.json.format(msgspec.json.encode(result)))
        if result.outcome != "published":
            raise UpdateFailed(_explain(result), result)
        return result

    def store_based_barrier(self, timeout: timedelta = timedelta(minutes=5)) -> None:
        """Wait for all ranks; needs no process group, and may be called any number of times.

        Raises:
            DeadlineExceeded: a rank did not come.
        """
        self._rendezvous.barrier("user", timeout.total_seconds())

    def close(self) -> None:
        """Stop listening and return all memory that no replica maps."""
        self._door.close()
        self._store.close()
        if self._collective is not None:
            self._collective.abandon()
        if self._registry is not None:
            self._registry.close()

    def _conduct(
        self,
        version: Version,
        policy: Policy,
        requests: Sequence[Request],
        timeout: timedelta,
        weight_version: str | None,
        *,
        open_ended: bool,
    ) -> Report:
        # The last update's keys may still be read by a slow rank; those before it, by nobody.
        while len(self._scopes) > 1:
            self._scopes.pop(0).clear()
        self._num_updates += 1
        conductor = Conductor(
            label=weight_version or self._name or "",
            version=version,
            rendezvous=self._rendezvous,
            store=self._store,
            door=self._door,
            collective=self._collective_of(version),
            policy=policy,
            timeout_seconds=timeout.total_seconds(),
            registry=self._open_registry,
            parent=self._published,
        )
        try:
            return conductor.run(self._num_updates, requests, open_ended=open_ended)
        finally:
            self._scopes.append(conductor.scope)

    @contextmanager
    def _leased(self, checkpoint_name: str) -> Iterator[None]:
        """Keep this rank's shard as it is, whatever is registered or unregistered meanwhile."""
        if checkpoint_name in self._store.labels:
            with self._store[checkpoint_name].segment.lease():
                yield
        else:
            yield

    def _adopt(self, checkpoint_name: str, metas: Sequence[RankMeta]) -> None:
        self._version, self._name = Version.of(metas), checkpoint_name

    def _gathered(self, checkpoint_name: str | None = None) -> Version:
        if self._version is None or (checkpoint_name and checkpoint_name != self._name):
            raise UsageError(
                f"checkpoint {checkpoint_name or ''!r} was not gathered: call gather_metas with "
                "its name on every rank first"
            )
        return self._version

    def _collective_of(self, version: Version) -> Collective | None:
        """The group of the hosts' leads, if there is more than one host and this rank leads."""
        hosts = version.hosts
        host = hosts.of_rank[self.rank]
        if len(hosts.names) == 1 or hosts.lead(host) != self.rank:
            return None
        if not self._auto_pg:
            raise UsageError("auto_pg is off: call init_process_group before update")
        if self._collective is None or self._collective.size != len(hosts.names):
            self._collective = Collective(self._rendezvous, index=host, size=len(hosts.names))
        return self._collective

    def _device_index(self) -> int:
        local_rank = os.environ.get("LOCAL_RANK", str(self.rank))
        return int(local_rank) % self._gpu_count if self._gpu_count else int(local_rank)

    def _open_registry(self) -> Registry:
        if self._registry is None:
            self._registry = Registry(state_dir() / "registry.sqlite")
        return self._registry


def _budget_bytes() -> int | None:
    configured = os.environ.get("CKPT_ENGINE_MEMORY_BYTES")
    if configured is not None and not configured.isdigit():
        raise UsageError(f"CKPT_ENGINE_MEMORY_BYTES={configured!r} is not a number of bytes")
    return int(configured) if configured else None


def _host() -> str:
    """Equal for processes that can reach each other's sockets, and so hand over descriptors."""
    if configured := os.environ.get("CKPT_ENGINE_HOST"):
        return configured
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    folder = socket_dir().stat()
    return f"{boot}-{folder.st_dev}-{folder.st_ino}"


def _explain(report: Report) -> str:
    """The first cause in one line, then what became of each replica, then the remote traceback."""
    reason = report.reason
    lines = [f"update to {report.version!r} {report.outcome.replace('_', ' ')}: {reason}"]
    lines += [f"  {replica.name}: {replica.outcome}" for replica in report.replicas]
    if reason is not None and reason.traceback:
        lines += [f"remote traceback ({reason.where}):", reason.traceback.rstrip()]
    return "\n".join(lines)
