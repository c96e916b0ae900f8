"""The ranks' shared keys as a torch store, in which a process group meets.

store = GroupStore(rendezvous_keys.fork(), prefix="gloo/update-17/")
group = ProcessGroupGloo(store, rank, size, options)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from checkpoint_engine.errors import DeadlineExceeded, TransferError
from checkpoint_engine.transport.keystore import KeyStore

__all__ = ["GroupStore"]

POLL_SECONDS = 0.2
DEFAULT_TIMEOUT = timedelta(minutes=5)


class GroupStore(Store):
    """What torch calls, from any of its threads. Owns `keys`.

    Torch does not keep this object alive: whoever makes a group of it must, as long as the group.

    Args:
        keys: where they are kept.
        prefix: of each.
        note: called with each that is set, so that it can be deleted in time.
    """

    def __init__(
        self, keys: KeyStore, prefix: str, note: Callable[[str], None] = lambda key: None
    ) -> None:
        super().__init__()
        self._keys, self._prefix, self._note = keys, prefix, note
        self._timeout = DEFAULT_TIMEOUT
        self._lock = threading.Lock()
        self._is_closed = False

    @property
    def timeout(self) -> timedelta:
        """The longest wait for a key, unless a call says else."""
        return self._timeout

    @property
    def is_closed(self) -> bool:
        """Whether nothing more is set or waited for."""
        return self._is_closed

    def set_timeout(self, timeout: timedelta) -> None:
        """Change that."""
        self._timeout = timeout

    def set(self, key: str, value: bytes | str) -> None:
        """Give a key a value."""
        with self._lock:
            self._check_open()
            self._note(key)
            self._keys.set(self._prefix + key, value.encode() if isinstance(value, str) else value)

    def get(self, key: str) -> bytes:
        """Wait until a key is set."""
        return self._found(key, self._timeout.total_seconds())

    def add(self, key: str, amount: int) -> int:
        """Add to a counter."""
        with self._lock:
            self._check_open()
            self._note(key)
            return self._keys.add(self._prefix + key, amount)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Wait until all of them are set."""
        seconds = (self._timeout if timeout is None else timeout).total_seconds()
        for key in keys:
            self._found(key, seconds)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all of them are set."""
        try:
            self.wait(keys, timedelta(0))
        except DeadlineExceeded:
            return False
        return True

    def delete_key(self, key: str) -> bool:
        """Forget a key."""
        with self._lock:
            self._check_open()
            return bool(self._keys.delete(self._prefix + key))

    def close(self) -> None:
        """Disconnect; the group is over, or needs no keys any more. Ends what waits."""
        self._is_closed = True
        with self._lock:
            self._keys.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise TransferError("the group was abandoned while it was made")

    def _found(self, key: str, seconds: float) -> bytes:
        """A key's value; the lock is let go now and then, for those who close."""
        deadline = time.monotonic() + seconds
        while True:
            left = max(0.0, deadline - time.monotonic())
            with self._lock:
                self._check_open()
                try:
                    return self._keys.get(self._prefix + key, min(left, POLL_SECONDS))
                except DeadlineExceeded as error:
                    if left <= POLL_SECONDS:
                        said = f"no rank of the group set {key!r} in {seconds:.1f} s"
                        raise DeadlineExceeded(said) from error
