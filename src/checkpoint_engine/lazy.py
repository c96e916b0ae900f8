"""Names of a package that are loaded when they are first used: what they need is slow to load.

__getattr__ = names_from(__name__, {"ParameterServer": "ps"})
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module

__all__ = ["names_from"]


def names_from(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__`, for names by the module of the package that each is from."""

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
