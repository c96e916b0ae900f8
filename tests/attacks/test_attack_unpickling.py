"""Nothing is ever unpickled: not by our code, not by what it calls, not in any of our processes."""

from __future__ import annotations

import ast
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e_server import COMMAND, Server

from checkpoint_engine.errors import UsageError
from checkpoint_engine.replica.replica import load_replica

HERE = Path(__file__).parent
SOURCES = sorted((HERE.parents[1] / "src").rglob("*.py"))

MODULES = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve",
    "multiprocessing", "torch.multiprocessing", "torch.load", "torch.save", "numba", "pty",
}  # fmt: skip
NAMES = {
    "recv_pyobj", "send_pyobj", "ForkingPickler", "all_gather_object", "gather_object",
    "broadcast_object_list", "scatter_object_list", "send_object_list", "recv_object_list",
    "allow_pickle", "os.system", "os.popen", "os.fork", "os.spawnv", "getoutput", "getstatusoutput",
    "create_subprocess_shell",
}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__"}
ARGUMENTS = {("shell", True), ("cache", True), ("allow_pickle", True), ("weights_only", False),
             ("trust_remote_code", True)}  # fmt: skip


# What the source says


def name_of(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain; `.c` where it begins with another expression."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return ""


def mentioned(tree: ast.AST) -> set[str]:
    """Every module, function and attribute that a file imports or uses."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute):
            names.add(name_of(node))
    return names


def offences(tree: ast.AST) -> set[str]:
    """What a file imports or calls that unpickles, starts processes that do, or runs text."""
    names = mentioned(tree)
    found = {name for name in names if any(f"{name}.".startswith(f"{bad}.") for bad in MODULES)}
    found |= {name for name in names if any(f".{name}".endswith(f".{bad}") for bad in NAMES)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found |= {name for name in [name_of(node.func)] if name in CALLS}
            found |= {
                f"{keyword.arg}={keyword.value.value}"
                for keyword in node.keywords
                if isinstance(keyword.value, ast.Constant)
                and (keyword.arg, keyword.value.value) in ARGUMENTS
            }
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(path.parents[2])))
def test_no_module_can(path: Path) -> None:
    assert offences(ast.parse(path.read_text())) == set()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch.multiprocessing as mp",
        "from torch import load",
        "from multiprocessing.shared_memory import SharedMemory",
        "from multiprocessing import reduction\nreduction.ForkingPickler.loads(b'')",
        "import torch\ndef f(path):\n    return torch.load(path, weights_only=True)",
        "import torch\nqueue = torch.multiprocessing.Queue()",
        "socket.recv_pyobj()",
        "context.socket(1).recv_pyobj()",
        "import torch.distributed as dist\ndist.all_gather_object(a, b)",
        "from torch.distributed import broadcast_object_list",
        "from numba import njit",
        "@njit(cache=True)\ndef f(): ...",
        "import numpy\nnumpy.load('x', allow_pickle=True)",
        "import subprocess\nsubprocess.run('true', shell=True)",
        "import os\nos.system('true')",
        "eval('1')",
        "exec('1')",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
    ],
)
def test_what_would_be_caught(code: str) -> None:
    assert offences(ast.parse(code))


# What processes do


@pytest.fixture
def watched(environment: dict[str, str], tmp_path: Path) -> Path:
    """From here on every process of this test writes down what it unpickles, into this folder."""
    folder = tmp_path / "watch"
    folder.mkdir()
    environment["WATCH_FOLDER"] = str(folder)
    paths = [str(HERE / "watch"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return folder


@pytest.mark.timeout(300)
def test_whole_updates_unpickle_nothing(
    watched: Path,
    start: Callable[..., Server],
    environment: dict[str, str],
    folders: tuple[Path, Path],
    free_port: int,
) -> None:
    """Two ranks that send each other files over gloo, then a trainer's two; from start to end."""
    old, new = folders
    servers = [start(old, command=COMMAND), start(old, command=COMMAND)]
    endpoints = [server.endpoint for server in servers]
    options = [option for endpoint in endpoints for option in ("--endpoint", endpoint)]
    ranks = [
        subprocess.Popen(
            [*COMMAND, "update", "--checkpoint-path", str(new), "--weight-version", "v", *options],
            env={
                **environment,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port - 1),
                "CKPT_ENGINE_HOST": f"host {rank}",
            },
        )
        for rank in range(2)
    ]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    assert [server.info()["weight_version"] for server in servers] == ["v", "v"]
    trainer = subprocess.run(
        [sys.executable, HERE / "attack_trainer.py", new / "model.safetensors", *endpoints],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    infos = [server.info() for server in servers]
    assert {info["digest"] for info in infos} == {trainer.stdout.split()[-1]}
    assert [entry["weight_version"] for entry in infos[0]["history"]][1:] == [
        "v",
        "step-1",
        "step-2",
    ]
    processes = {str(child.pid) for child in [*ranks, *(server.process for server in servers)]}
    assert processes < {path.stem for path in watched.glob("*.watched")}
    assert [path.read_text() for path in watched.glob("*.unpickled")] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle; pickle.loads(pickle.dumps([1]))",
        "import io, pickle; pickle.load(io.BytesIO(pickle.dumps([1])))",
        "import io, pickle; pickle.Unpickler(io.BytesIO(pickle.dumps([1]))).load()",
        "import io, pickle; pickle._Unpickler(io.BytesIO(pickle.dumps(print))).load()",
        "import io, torch; f = io.BytesIO(); torch.save([1], f); f.seek(0); torch.load(f)",
        "import multiprocessing.connection as c; a, b = c.Pipe(); a.send(1); b.recv()",
    ],
)
def test_who_does_it_is_seen(watched: Path, environment: dict[str, str], code: str) -> None:
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    assert list(watched.glob("*.unpickled"))


# What a folder brings


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "pytorch_model.pt"])
def test_a_pickled_checkpoint_is_refused_unread(
    folders: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "unpickled"
    copy_without_weights(folders[0], folder)
    (folder / name).write_bytes(pickle.dumps({"lm_head.weight": Payload(marker)}))
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_replica(folder, name="r", load_format="auto", wait_for_initial_weights=False)
    assert not marker.exists()


def test_even_a_harmless_pickle_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """It is the format that is refused; torch would load this one."""
    folder = tmp_path / "model"
    copy_without_weights(folders[0], folder)
    torch.save({"lm_head.weight": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"cannot be loaded: .*safetensors"):
        load_replica(folder, name="r", load_format="auto", wait_for_initial_weights=False)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_code_in_a_folder_is_not_run(
    folders: tuple[Path, Path], tmp_path: Path, load_format: str
) -> None:
    folder, marker = tmp_path / "model", tmp_path / "run"
    copy_without_weights(folders[0], folder)
    (folder / "config.json").write_text(
        '{"model_type": "evil", '
        '"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}'
    )
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(UsageError, match="cannot be loaded"):
        load_replica(folder, name="r", load_format=load_format, wait_for_initial_weights=False)
    assert not marker.exists()


def copy_without_weights(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
