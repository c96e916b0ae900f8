"""An engine for trainers and samplers that are Ray actors.

Ray is where they meet, and nothing more. Its object store moves Python objects, which are pickled,
copied into its shared memory and once more into each receiver's; what is received there is not
checked, and is whole before the first tensor is used. So bytes go by gloo from actor to actor, as
with `GlooCheckpointEngine`, and Ray carries three strings: the master's address and port, and a
secret that it makes up, so none has to be given to the nodes.

    engine = RayCheckpointEngine()
    engine.is_master = True                         # in the trainer's actor
    engine.prepare()
    engine.init_process_group(rank=0, world_size=3)         # samplers find it by `group_name`
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from checkpoint_engine.errors import DeadlineExceeded, UsageError
from checkpoint_engine.streaming.collective import GlooCheckpointEngine
from checkpoint_engine.transport.meeting import Meeting

__all__ = ["RayCheckpointEngine"]

POLL_SECONDS = 0.1


class _Board:
    """An actor on which the master leaves where it is."""

    def __init__(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata

    def read(self) -> dict[str, Any]:
        """What it left."""
        return self._metadata


class RayCheckpointEngine(GlooCheckpointEngine):
    """Between Ray actors; `ray.init` has been called, as it has in every actor.

    Args:
        args: as `StreamingEngine`.
        group_name: what to look for where no `master_metadata` is passed; one for each stream.
        kwargs: as `StreamingEngine`.

    Raises:
        UsageError: ray is not installed, or not initialized.
    """

    name = "ray"

    def __init__(self, *args: Any, group_name: str = "default", **kwargs: Any) -> None:
        try:
            self._ray = import_module("ray")
        except ImportError as error:
            raise UsageError(
                'RayCheckpointEngine needs ray: pip install "ckpt-engine[ray]"'
            ) from error
        if not self._ray.is_initialized():
            raise UsageError("RayCheckpointEngine lives in a Ray actor, or after ray.init()")
        self._actor_name = f"ckpt-engine/{group_name}"
        self._secret = secrets.token_hex(32)
        self._board: Any = None
        super().__init__(*args, **kwargs)

    def prepare(self) -> dict[str, Any]:
        """See `StreamingEngine`; what the master returns holds the secret, too."""
        if self.is_master and self._board is None:
            self._metadata = {**super().prepare(), "secret": self._secret}
            actor = self._ray.remote(num_cpus=0)(_Board).options(name=self._actor_name)
            self._board = actor.remote(self._metadata)
        return dict(self._metadata)

    def finalize(self) -> None:
        """See `StreamingEngine`."""
        if self._board is not None:
            self._ray.kill(self._board)
            self._board = None
        super().finalize()

    def meeting(self, metadata: Mapping[str, Any] | None) -> Meeting:
        """Where the master is, as it says, or has left on the board."""
        if metadata is None and self.is_master:
            host, port, secret = self._ray.util.get_node_ip_address(), 0, self._secret
        else:
            found = metadata or self._found()
            try:
                host, port, secret = found["master_addr"], found["master_port"], found["secret"]
            except KeyError as error:
                raise UsageError(
                    f"master_metadata has no {error}: pass what prepare() of the master returned, "
                    "which is a RayCheckpointEngine, too"
                ) from error
        return Meeting(host, port, by_launcher=False, secret=secret.encode())

    def _found(self) -> Mapping[str, Any]:
        deadline = time.monotonic() + self._settings.timeout_seconds
        errors = self._ray.exceptions
        while time.monotonic() < deadline:
            try:
                board = self._ray.get_actor(self._actor_name)
                found: Mapping[str, Any] = self._ray.get(
                    board.read.remote(), timeout=deadline - time.monotonic()
                )
            except (ValueError, errors.RayActorError, errors.GetTimeoutError):
                time.sleep(POLL_SECONDS)  # not yet, or not any more, or it is held
            else:
                return found
        raise DeadlineExceeded(
            f"no Ray actor has prepared an engine as the master under {self._actor_name!r} in "
            f"{self._settings.timeout_seconds:.0f} s"
        )
