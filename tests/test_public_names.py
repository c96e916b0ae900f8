"""The package's face: every public name is listed, exists, and costs nothing until it is used."""

from __future__ import annotations

import subprocess
import sys
import types

import checkpoint_engine
from checkpoint_engine import errors


def test_all_is_the_sorted_list_of_public_names() -> None:
    for name in checkpoint_engine.__all__:
        getattr(checkpoint_engine, name)
    public = [
        name
        for name in dir(checkpoint_engine)
        if not name.startswith("_")
        and not isinstance(getattr(checkpoint_engine, name), types.ModuleType)
    ]
    assert checkpoint_engine.__all__ == sorted(public)


def test_every_error_is_public() -> None:
    assert set(errors.__all__) <= set(checkpoint_engine.__all__)
    for name in errors.__all__:
        assert getattr(checkpoint_engine, name) is getattr(errors, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(checkpoint_engine, "no_such_name")


def test_importing_the_package_imports_no_torch() -> None:
    heavy = {"torch", "numpy", "httpx"}
    script = f"import sys, checkpoint_engine; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
