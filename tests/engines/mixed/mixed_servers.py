"""vLLM, SGLang and our replica, which serve one model and are updated by one command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from engine_server import ROOT, EngineServer, environment
from sglang_server import PROMPT, SGLangServer
from vllm_server import EXTENSION, VllmServer

HERE = Path(__file__).parent
UPDATE_SECONDS = 300.0
KINDS = ("vllm", "sglang", "replica")

Tokens = tuple[int, ...]


class ReplicaServer(EngineServer):
    """`ckpt-engine replica`; see `EngineServer`."""

    def __init__(self, folder: Path, log: Path) -> None:
        command = [sys.executable, "-m", "checkpoint_engine", "replica", "--model", str(folder)]
        super().__init__([*command, "--name", "ours"], log, {"OMP_NUM_THREADS": "1"})

    def generate(self, num_tokens: int, prompt: Sequence[int]) -> list[int]:
        """Greedy tokens after a prompt."""
        body = {
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        return list(self.post("/v1/completions", body)["choices"][0]["token_ids"])

    @property
    def label(self) -> str:
        return str(self.get("/weight_info")["weight_version"])


Server = VllmServer | SGLangServer | ReplicaServer


def launch(kind: str, python: Path, folder: Path, log: Path, held: Path | None = None) -> Server:
    """Start a server of one kind; whoever waits for it waits for `ready`.

    Args:
        held: makes it one whose loader may be stopped half-way; see `held`.
    """
    variables: dict[str, str] = {}
    if held is not None:
        path = os.pathsep.join([str(ROOT / "src"), str(HERE)])
        variables = {"PYTHONPATH": path, "HELD": str(held)}
    if kind == "vllm":
        worker = () if held is None else ("--worker-cls", "held_vllm.Worker")
        options = ("--worker-extension-cls", EXTENSION, *worker)
        return VllmServer(python, folder, log, *options, **variables)
    if kind == "sglang":
        models = {} if held is None else {"SGLANG_EXTERNAL_MODEL_PACKAGE": "held_sglang"}
        return SGLangServer(python, folder, log, **models, **variables)
    return ReplicaServer(folder, log)


def ready(server: Server) -> None:
    """Wait until it serves."""
    server.wait_for("/ready" if isinstance(server, SGLangServer) else "/health")


def tokens_of(server: Server) -> Tokens:
    """Greedy ones after a prompt that all of them take."""
    return tuple(server.generate(16, PROMPT))


def look(servers: Sequence[Server]) -> list[tuple[str, Tokens]]:
    """Label and tokens of each."""
    return [(server.label, tokens_of(server)) for server in servers]


@dataclass(frozen=True)
class Fleet:
    """One server of each kind.

    Attributes:
        fresh: by version, the tokens of servers of these kinds that were started on it.
    """

    servers: tuple[Server, ...]
    fresh: Mapping[str, tuple[Tokens, ...]]

    def shows(self, version: str, label: str) -> bool:
        """Whether all of them serve this version under this label, each as if started on it."""
        return look(self.servers) == [(label, tokens) for tokens in self.fresh[version]]


@dataclass(frozen=True)
class Ended:
    """How `ckpt-engine update` ended: its exit code, its report, and what it said."""

    code: int
    report: dict[str, Any]
    said: str

    @property
    def outcomes(self) -> list[str]:
        return sorted(replica["outcome"] for replica in self.report["replicas"])


def update(servers: Sequence[Server], folder: Path, label: str, *options: str) -> Ended:
    """One transaction over all of them, each asked what it is."""
    endpoints = [word for server in servers for word in ("--endpoint", server.url)]
    command = [
        sys.executable, "-m", "checkpoint_engine", "update", "--engine", "auto", *endpoints,
        "--checkpoint-path", str(folder), "--weight-version", label, "--json", *options,
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=UPDATE_SECONDS,
        env=environment(),
        check=False,
    )
    report = msgspec.json.decode(done.stdout) if done.stdout else {}
    return Ended(done.returncode, report, done.stderr)
