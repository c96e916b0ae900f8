"""What holds for every file of the project."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_imports(path: Path) -> None:
    try:
        importlib.import_module(module_name(path))
    except ModuleNotFoundError as error:
        if error.name != "vllm":  # is there where vLLM imports them: tests/engines
            raise


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CONTRIBUTING.md"])
def test_the_project_explains_itself(name: str) -> None:
    assert (ROOT / name).read_text().strip()
