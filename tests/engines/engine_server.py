"""A real engine's server on the CPU, whichever engine it is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file
from typing_extensions import Self

from children import free_port

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 1800.0
START_SECONDS = 240.0
ANSWER_SECONDS = 120.0

# In a session of its own, a server that generates makes Linux 6.18 leave all other sessions without
# a processor for seconds (sched_autogroup); Python 3.10 has nothing else.
OWN_GROUP: dict[str, Any] = (
    {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
)


def python_of(engine: str) -> Path:
    """The Python of an engine's environment, which is made if it is not there."""
    built = subprocess.run(
        [str(ROOT / "scripts/engines" / engine)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert built.returncode == 0, f"scripts/engines/{engine} could not build the environment"
    return Path(built.stdout.strip())


class EngineServer:
    """One server in a process group of its own. The context manager ends it, whatever happened.

    Args:
        command: of the server; `--port` and what `variables` say is added.
        log: what it prints.
        variables: of its environment, beside those of this process.
    """

    def __init__(self, command: Sequence[str], log: Path, variables: Mapping[str, str]) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        # An engine may hang up after an error, which must not be taken for the next answer.
        one_each = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS, limits=one_each)
        with log.open("w") as out:
            self._process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(port)],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(**variables),
                **OWN_GROUP,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, path: str, status: int = 200) -> None:
        """Until GET `path` answers with this status."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, f"the server ended:\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, f"{path} never said {status}:\n{self.log[-3000:]}"
            try:
                if self.status(path) == status:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.2)

    def status(self, path: str) -> int:
        return self.client.get(path).status_code

    def get(self, path: str) -> Any:
        return _decoded(path, self.client.get(path))

    def post(self, path: str, body: object = None) -> Any:
        return _decoded(path, self.client.post(path, json=body))

    def kill(self) -> None:
        """SIGKILL for the server and all its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self.client.close()


def _decoded(path: str, answer: httpx.Response) -> Any:
    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
    return answer.json()


def environment(**variables: str) -> dict[str, str]:
    """For a process that imports our package from this checkout."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE"))}
    ours = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {**known, **ours, **variables}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), file)
    return file


def damage(file: Path, name: str) -> None:
    """Change a tensor's bytes so that size and time of the file stay: only reading it tells."""
    found = os.stat(file)
    bits = load_file(file)[name].contiguous().view(torch.uint8).numpy().tobytes()
    data = file.read_bytes()
    place = data.index(bits)
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(bytes(len(bits)))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
