"""The LoRA adapters of one engine, as the transaction sees an engine.

Nothing of ours runs where an engine keeps them: it reads them from folders (`lora_folders`). So the
session runs beside the rank that calls the engine, and each step is a question to its server:

    prepare: write the folder, have it tried ─► apply: load ─► check: shown? folder as it was?
    roll back: load the folder of the version before again, or unload if there was none; if that
        fails, serve nothing under the name, so that requests for others go on

What an engine shows is a path, and the path names the digest, so that what it serves is asked for,
never remembered.

    adapter = LoraAdapter(engine, endpoint, "helper", folders, timeout_seconds=60)
    outcome = session.run(handle, adapter, Attachments(keep_maps=False))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from checkpoint_engine.adapters.base import Content, Identity, Served
from checkpoint_engine.adapters.lora_folders import LoraFolders
from checkpoint_engine.engines.base import LoraEngine
from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.errors import AdapterError, CheckpointEngineError, VerificationError
from checkpoint_engine.manifest import Manifest, TensorMeta, Version
from checkpoint_engine.memory import IdleWorkers, Workers

__all__ = ["UNLOADED", "LoraAdapter"]

UNLOADED = ""
"""The digest that stands for no adapter under a name."""


class LoraAdapter:
    """See the module's text; the methods are those of `adapters.base.Adapter`.

    Args:
        engine: the engine's kind.
        endpoint: where it listens.
        name: what requests call the LoRA by.
        folders: this engine's, locked.
        timeout_seconds: for each step of the engine's.
    """

    epoch = 0
    undecided: str | None = None

    def __init__(
        self,
        engine: LoraEngine,
        endpoint: Endpoint,
        name: str,
        folders: LoraFolders,
        timeout_seconds: float,
    ) -> None:
        self.identity = Identity(replica=endpoint.url, engine=endpoint.url)
        self._engine, self._endpoint, self._name = engine, endpoint, name
        self._timeout_seconds = timeout_seconds
        self._folders = folders
        self._before: str | None = None
        self._folder: Path | None = None  # None to unload
        self._is_new = True  # the folder, and so nobody's but this update's
        self._may_go = True
        self._is_ours_to_let_go = False

    def base(self) -> str | None:
        """Digest of what is served under the name; None if nothing is, or nothing of ours."""
        return self._folders.digest_of(self._shown())

    def recall(self, digest: str) -> Content | None:
        """No adapter, which every engine can return to."""
        return _NoLora() if digest == UNLOADED else None

    def prepare(self, content: Content, version: Version) -> str:
        """While serving: verify the bytes, write them, and have the engine try them.

        Raises:
            VerificationError: the bytes are not the version's.
            StoreError: there is no memory for the folder.
            AdapterError: the engine would not take it; or, to unload, it has none of that name.
        """
        loras = self._endpoint.loras()
        self._before = loras.get(self._name)
        self._folders.sweep(set(loras.values()))
        if isinstance(content, _NoLora):
            if self._before is None:
                raise AdapterError(
                    f"{self._endpoint.url} has no LoRA adapter {self._name!r}; it has "
                    f"{', '.join(sorted(loras)) or 'none'}"
                )
            return "source"
        self._is_new = not self._folders.has(self._name, content.manifest.digest)
        try:
            with IdleWorkers() as pool:
                content.verify(pool)
            self._folder = self._folders.write(self._name, content)
        finally:
            content.release()
        self._engine.check_lora(
            self._endpoint, self._name, str(self._folder), self._timeout_seconds
        )
        return "source"

    def abort(self) -> None:
        """Remove what was written; what was there before, somebody may need."""
        if self._folder is None or str(self._folder) == self._before:
            return
        if self._is_new:
            self._folders.remove(self._folder)
        else:
            self._folders.retire(str(self._folder))

    def pause(self, timeout_seconds: float) -> None:
        """Keep requests waiting, where the engine can."""
        self._is_ours_to_let_go = self._engine.hold_loras(self._endpoint, timeout_seconds)

    def apply(self) -> None:
        """Load it, or unload what there is."""
        self._serve(None if self._folder is None else str(self._folder))

    def check(self) -> Served:
        """Ask the engine which version it shows, and see that what it has read is that version.

        Raises:
            VerificationError: it shows another, or the folder has changed.
        """
        if self._folder is None:
            # Until its folder has gone, a request may have it loaded again at any moment.
            self._check_shown(*((None, self._before) if self._may_go else (None,)))
            return Served(digest=UNLOADED, served_digest=None)
        self._check_shown(str(self._folder))
        self._folders.check(self._folder)
        return Served(digest=self._folder.name, served_digest=None)

    def publish(self) -> None:
        """Remove the versions before the last, and that too if nobody may need it any more.

        A request that waited while SGLang had neither asks for the last by its folder, and is given
        the new one only if that is still there.
        """
        if self._folder is None and self._may_go:
            self._serve_nothing()
            return
        needed = {str(self._folder)}
        if self._before is not None:
            needed.add(self._before)
            self._folders.retire(self._before)
        self._folders.keep_only(self._name, needed)

    def roll_back(self) -> None:
        """Serve what was served before, from its own folder.

        Raises:
            AdapterError: that cannot be; says whether requests go on, without the adapter.
        """
        try:
            if self._before is None:
                self._serve_nothing()
            else:
                if self._folders.digest_of(self._before):
                    self._folders.check(Path(self._before))
                self._serve(self._before)
                self._check_shown(self._before)
        except CheckpointEngineError as error:
            raise AdapterError(f"{error}; {self._give_up()}") from error
        if self._folder is not None and str(self._folder) != self._before:
            self._folders.retire(str(self._folder))  # who came while it was shown may ask for it

    def _give_up(self) -> str:
        """Better nothing under the name than nobody knows what; returns what has become of it."""
        try:
            self._serve_nothing()
            self._engine.drop_lora_caches(self._endpoint)
            self.resume()
        except AdapterError as error:
            return f"{self._name!r} may be either adapter, and requests may wait: {error}"
        return f"nothing is served as {self._name!r} now: load it again"

    def resume(self) -> None:
        """Let requests go on, unless somebody else keeps them waiting."""
        if self._is_ours_to_let_go:
            self._engine.let_go_loras(self._endpoint)

    def quarantine(self, reason: str) -> None:
        """The report says it; without a decision nobody is kept waiting."""

    def tear(self, reason: str) -> None:
        """The report says it; `roll_back` has done what could be done."""

    def _shown(self) -> str | None:
        return self._endpoint.loras().get(self._name)

    def _check_shown(self, *due: str | None) -> None:
        if (shown := self._shown()) not in due:
            raise VerificationError(
                f"{self._endpoint.url} shows {shown} as {self._name!r}, not {due[0]}"
            )

    def _serve_nothing(self) -> None:
        """Under this name, also to requests that would have an engine load it again."""
        self._serve(None)
        if self._may_go:
            self._folders.keep_only(self._name, set())
            self._serve(None)  # what a request has had loaded again, which none can from now on
        self._check_shown(None)

    def _serve(self, folder: str | None) -> None:
        if folder is not None:
            self._engine.load_lora(self._endpoint, self._name, folder, self._timeout_seconds)
        else:
            self._may_go = self._engine.unload_lora(
                self._endpoint, self._name, self._timeout_seconds
            )


class _NoLora:
    """The content of a version that has none; see `adapters.base.Content`."""

    manifest = Manifest.of(())
    way_back = "source"

    def verify(self, pool: Workers) -> None:
        """There is nothing to verify."""

    def is_there(self) -> bool:
        """Always."""
        return True

    def tensor(self, meta: TensorMeta) -> torch.Tensor:
        """There is none."""
        raise AdapterError(f"no adapter has no tensor {meta.name!r}")

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """None."""
        return iter(())

    def chunk(self, meta: TensorMeta, start: int, end: int) -> Callable[[], memoryview]:
        """There is none."""
        raise AdapterError(f"no adapter has no tensor {meta.name!r}")

    def discard_writes(self) -> None:
        """Nothing was written."""

    def rest(self) -> None:
        """It needs nothing."""

    def release(self) -> None:
        """It holds nothing."""
