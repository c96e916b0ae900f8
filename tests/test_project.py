"""What holds for every file of the project."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src").rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
SPAWNERS = {"multiprocessing", "torch.multiprocessing"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def name_of(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; "" for any other expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := name_of(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def imported_by(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def offences(tree: ast.AST) -> set[str]:
    """What a file imports or uses that unpickles, or starts processes that do."""
    names = imported_by(tree)
    names |= {name_of(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    forbidden = UNPICKLERS | SPAWNERS | {"torch.load"}
    return {name for name in names if any(f"{name}.".startswith(f"{bad}.") for bad in forbidden)}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_every_module_imports(path: Path) -> None:
    importlib.import_module(module_name(path))


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_nothing_is_ever_unpickled(path: Path) -> None:
    assert offences(ast.parse(path.read_text())) == set()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.multiprocessing as mp",
        "from torch import load",
        "from multiprocessing.shared_memory import SharedMemory",
        "import torch\ndef f(path):\n    return torch.load(path, weights_only=True)",
        "import torch\nqueue = torch.multiprocessing.Queue()",
    ],
)
def test_what_would_be_caught(code: str) -> None:
    assert offences(ast.parse(code))


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CONTRIBUTING.md"])
def test_the_project_explains_itself(name: str) -> None:
    assert (ROOT / name).read_text().strip()
