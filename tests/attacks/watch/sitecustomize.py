"""On the path of a process, writes down whatever that process unpickles, and how it came to it.

The interpreter's audit event tells of every class or function that a pickle asks for, whichever
unpickler reads it. The functions of `pickle` are wrapped besides, since plain data asks for none,
and so is torch's own unpickler, which resolves names by itself.
Each process writes files of its own in $WATCH_FOLDER.
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

FOLDER = os.environ["WATCH_FOLDER"]


def record(what: str) -> None:
    stack = "".join(traceback.format_stack()[:-1])
    with open(f"{FOLDER}/{os.getpid()}.unpickled", "a") as file:
        file.write(f"{sys.argv} {what}\n{stack}\n")


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class":
        record(f"{event} {arguments}")
    torch = getattr(sys.modules.get("torch._weights_only_unpickler"), "Unpickler", None)
    if torch is not None and torch.load.__name__ == "load":
        torch.load = watched("torch.Unpickler.load", torch.load)


def watched(name: str, function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        record(name)
        return function(*args, **kwargs)

    return call


def watch() -> None:
    import _pickle
    import pickle

    class Unpickler(_pickle.Unpickler):
        def load(self) -> Any:
            record("pickle.Unpickler.load")
            return super().load()

    for module in (pickle, _pickle):
        module.load = watched("pickle.load", module.load)
        module.loads = watched("pickle.loads", module.loads)
        module.Unpickler = Unpickler
    sys.addaudithook(hook)
    open(f"{FOLDER}/{os.getpid()}.watched", "w").close()


watch()
