"""A rank of a parameter server, which updates toy replicas and dies where it is told to."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
from safetensors.torch import save_file
from toy import Faults, ask, label, lift, make_model

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.registry import Registry, state_dir
from checkpoint_engine.transport import peers, zeromq
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.update import conductor
from checkpoint_engine.update.protocol import Report
from children import serve

CALL_SECONDS = 30.0
GRACE_SECONDS = 10.0
LEASE_SECONDS = 2.0
RENEW_SECONDS = 0.5

Handles = Any


class Trainer:
    """The commands."""

    def __init__(self) -> None:
        self._faults = Faults()
        self._make_fragile()
        self._server = ParameterServer()
        self._streamed: str | None = None

    def arm(self, point: str, what: str) -> None:
        self._faults.arm(point, what)

    def recover(self) -> None:
        self._faults.disarm()
        lift(resource.RLIMIT_FSIZE)

    def register(self, seed: int, streamed: bool = False) -> None:
        """This rank's share of a version; the memory of those before is used again.

        One that is streamed has its file open and deleted, and takes the place of the last.
        """
        tensors = list(make_model(seed).state_dict().items())
        share = dict(tensors[self._server.rank :: self._server.world_size])
        if streamed:
            self._register_file(seed, share)
        else:
            self._server.register_checkpoint(
                label(seed), named_tensors=share, use_shared_memory_pool=True
            )
        self._server.gather_metas(label(seed))

    def _register_file(self, seed: int, tensors: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/{label(seed)}.safetensors"
            save_file(tensors, path)
            self._server.register_checkpoint(label(seed), files=[path], mode="streamed")
        if self._streamed is not None:
            self._server.unregister_checkpoint(self._streamed)
        self._streamed = label(seed)

    def flip(self, seed: int) -> None:
        """Bad memory: one bit of what was registered."""
        self._server._store[label(seed)].memory[0] ^= 1

    def unregister(self, seed: int) -> None:
        self._server.unregister_checkpoint(label(seed), force=True)

    def update(
        self, seed: int, replicas: list[str], timeout: float, **options: Any
    ) -> dict[str, Any]:
        """Make these replicas take a version; returns the report, and the error if any."""
        requests = [_request(path) for path in replicas]
        limit = timedelta(seconds=timeout)
        return _outcome(
            lambda: self._server.update(label(seed), requests, timeout=limit, **options)
        )

    def metas(self) -> dict[int, Any]:
        """By which others join what this server has published."""
        return self._server.get_metas()

    def join(
        self, metas: dict[str, Any], replicas: list[str], timeout: float = CALL_SECONDS
    ) -> dict[str, Any]:
        """Bring replicas to what another server has published; returns what `update` does."""
        requests = [_request(path) for path in replicas]
        limit = timedelta(seconds=timeout)
        return _outcome(lambda: self._server.join(metas, requests, timeout=limit))

    def num_readers(self) -> int:
        """Who has a lease of this rank's memory."""
        control = self._server._shelf._server
        return len(control._holders) if control else 0

    def settle(self) -> list[tuple[str, str]]:
        """What became of the updates that a coordinator before this one did not finish."""
        registry = self._server._open_registry()
        ended = {record.id for record in registry.settle()}
        return [(r.version, r.outcome or "") for r in registry.history() if r.id in ended]

    def history(self) -> list[dict[str, Any]]:
        registry = Registry(state_dir() / "registry.sqlite")
        try:
            return [msgspec.to_builtins(record) for record in registry.history()]
        finally:
            registry.close()

    def close(self) -> None:
        self._server.close()

    def _make_fragile(self) -> None:
        """Every place at which a coordinator may die."""
        faults = self._faults
        conductor.GRACE_SECONDS = GRACE_SECONDS
        conductor.deliver = before(conductor.deliver, lambda: faults.strike("staging"))
        Registry.start = before(Registry.start, lambda: faults.strike("opening"))
        Registry.start = after(Registry.start, lambda: faults.strike("started"))
        Registry.publish = before(Registry.publish, lambda: faults.strike("deciding"))
        Registry.publish = after(Registry.publish, lambda: faults.strike("decided"))
        Registry.finish = after(Registry.finish, lambda: faults.strike("finished"))
        Collective.begin = before(Collective.begin, lambda: faults.strike("moving"))
        zeromq._receive = after(zeromq._receive, lambda: faults.strike("reading"))
        peers.LEASE_SECONDS, peers.RENEW_SECONDS = LEASE_SECONDS, RENEW_SECONDS
        points = {"Proceedapply": "applying", "Proceedpublish": "telling"}
        faults.after_message(Channel, points)


def before(function: Callable[..., Any], strike: Callable[[], None]) -> Any:
    def struck(*arguments: Any, **named: Any) -> Any:
        strike()
        return function(*arguments, **named)

    return struck


def after(function: Callable[..., Any], strike: Callable[[], None]) -> Any:
    def struck(*arguments: Any, **named: Any) -> Any:
        result = function(*arguments, **named)
        strike()
        return result

    return struck


def _outcome(bring: Callable[[], Report]) -> dict[str, Any]:
    try:
        report = bring()
    except UpdateFailed as failure:
        return {"error": str(failure), **msgspec.to_builtins(failure.report)}
    return {"error": None, **msgspec.to_builtins(report)}


def _request(path: str) -> Callable[[Handles], None]:
    """The call of one replica, which answers when the update is over for it."""

    def request(handles: Handles) -> None:
        handle = handles[int(os.environ.get("RANK", "0"))][1]
        said = ask(path, handle, CALL_SECONDS).strip()
        if said != "published":
            raise RuntimeError(said or "the replica hung up")

    return request


def main() -> None:
    trainer = Trainer()
    serve(trainer)
    trainer.close()


if __name__ == "__main__":
    main()
