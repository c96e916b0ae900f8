"""A stand-in for SGLang that takes LoRA adapters, fails or lies when told to. Over real HTTP."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TRIAL = ".ckpt-trial"
Spoil = Callable[["LoraEngine", str, Path], None]


class LoraEngine:
    """Reads an adapter's files when it is loaded, refuses a second of one name, shows paths.

    Attributes:
        served: what it has read, by name.
        shown: the path of each.
        refuses: names that it does not load, and what it says.
        on_load: called before it reads, with itself, the name and the folder.
        on_loaded: likewise once it has read.
        paused: whether requests wait.
        healthy: whether it says that it is.
        num_running: requests in flight.
        pauses_late: it pauses, but its answer is an error.
        reloads: it loads again by itself what it has unloaded, once for each number here, if its
            folder is there: a request has asked for it.
    """

    def __init__(self, owner: str = "sglang") -> None:
        self.owner = owner
        self.url = ""
        self.served: dict[str, dict[str, torch.Tensor]] = {}
        self.shown: dict[str, str] = {}
        self.refuses: dict[str, str] = {}
        self.on_load: Spoil | None = None
        self.on_loaded: Spoil | None = None
        self.asked: list[str] = []
        self.paused = self.pauses_late = False
        self.healthy = True
        self.num_running = self.reloads = 0

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
        self.asked.append(path)
        if path == "/load_lora_adapter":
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/unload_lora_adapter":
            return self._unload(body["lora_name"])
        if path in ("/pause_generation", "/continue_generation"):
            self.paused = path == "/pause_generation"
            return (504 if self.paused and self.pauses_late else 200), {}
        if path in ("/ready", "/ping"):
            well = self.healthy and not (self.paused and path == "/ready")
            return (200 if well else 503), None
        if path.startswith("/v1/loads"):
            load = {"num_running_reqs": self.num_running, "num_waiting_reqs": 0}
            return 200, {"loads": [load]}
        cards = [{"id": "m", "owned_by": self.owner, "root": "m", "parent": None}]
        for name, root in self.shown.items():
            cards.append({"id": name, "owned_by": self.owner, "root": root, "parent": "m"})
        return 200, {"data": cards}

    def _load(self, name: str, folder: Path) -> tuple[int, object]:
        if name in self.served:
            return 400, {"success": False, "error_message": f"{name} is already loaded"}
        if name in self.refuses:
            return 400, {"success": False, "error_message": self.refuses[name]}
        if self.on_load and not name.endswith(TRIAL):
            self.on_load(self, name, folder)
        self.served[name] = load_file(folder / "adapter_model.safetensors")
        json.loads((folder / "adapter_config.json").read_text())
        self.shown[name] = str(folder)
        if self.on_loaded and not name.endswith(TRIAL):
            self.on_loaded(self, name, folder)
        return 200, {"success": True}

    def _unload(self, name: str) -> tuple[int, object]:
        if name not in self.served:
            return 400, {"success": False, "error_message": f"{name} does not exist"}
        folder = Path(self.shown.pop(name))
        del self.served[name]
        if self.reloads and folder.exists():
            self.reloads -= 1
            self._load(name, folder)
        return 200, {"success": True}


@contextmanager
def serving(engine: LoraEngine) -> Iterator[LoraEngine]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = engine.answer(self.path, json.loads(data) if data else {})
            self.send_response(status)
            encoded = json.dumps(body).encode()
            self.send_header("content-length", str(len(encoded)))
            self.end_headers()
            self.wfile.write(encoded)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        engine.url = f"http://127.0.0.1:{listener.server_port}"
        try:
            yield engine
        finally:
            listener.shutdown()
            thread.join()


NAMES = [
    f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{part}.weight"
    for n in range(2)
    for part in "AB"
]
CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "peft_type": "LORA"}


def lora_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(2, 3, generator=generator) for name in NAMES}


def save_lora(folder: Path, seed: int, **config: object) -> Path:
    folder.mkdir()
    save_file(lora_tensors(seed), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder
