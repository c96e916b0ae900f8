"""What the transaction asks of an inference engine, and what an engine imports to start up.

The names below are those of `checkpoint_engine.startup`, a floor above, and loaded when they are
first used: engines know them by this path.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from checkpoint_engine.startup import CkptEngineConnector, CkptEngineModelLoader

__all__ = ["CkptEngineConnector", "CkptEngineModelLoader"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import_module("checkpoint_engine.startup"), name)
