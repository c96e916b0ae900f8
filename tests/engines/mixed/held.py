"""Half a load: a loader of a real engine that stops in the middle, and waits to be killed.

It does so if the folder `$HELD` has a file "hold", and then writes its process's id to "pid" there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

NUM_LOADED = 9
HOLD_SECONDS = 300.0


def held(weights: Iterable[T]) -> Iterator[T]:
    """The weights, or the first of them and then nothing."""
    folder = Path(os.environ["HELD"])
    for number, weight in enumerate(weights):
        if number == NUM_LOADED and (folder / "hold").exists():
            (folder / "new").write_text(f"{os.getpid()}")
            (folder / "new").rename(folder / "pid")
            time.sleep(HOLD_SECONDS)
            raise TimeoutError("nobody killed this process")
        yield weight
