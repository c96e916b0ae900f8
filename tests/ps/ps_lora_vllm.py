"""A stand-in for vLLM that takes LoRA adapters, and is paused and resumed. Over real HTTP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ps_lora_engine import LoraEngine
from safetensors.torch import load_file

from checkpoint_engine.engines.vllm import EXTENSION


class LoraVllm(LoraEngine):
    """Loads in place; what its workers and its caches say can be set.

    Attributes:
        says: what a worker answers when it has tried an adapter; None if that is well.
        drops: whether it drops its prefix cache when it is asked to.
        takes_loras: whether it was started with `--enable-lora`.
        may_load: whether it was started so that adapters may be loaded at run time.
    """

    def __init__(self) -> None:
        super().__init__("vllm")
        self.says: str | None = None
        self.drops = self.takes_loras = self.may_load = True

    def answer(self, path: str, body: Mapping[str, Any]) -> tuple[int, object]:
        what = path.partition("?")[0]
        if what == "/v1/load_lora_adapter":
            self.asked.append(path)
            assert self.paused, "requests wait while it is replaced"
            return self._load_in_place(body["lora_name"], Path(body["lora_path"]))
        if what == "/v1/unload_lora_adapter":
            return super().answer("/unload_lora_adapter", body)
        if what in ("/pause", "/resume"):
            self.paused = what == "/pause"
            if self.paused and self.pauses_late:
                self.asked.append(path)
                return 504, {}
        answers: dict[str, object] = {
            "/pause": {},
            "/resume": {},
            "/is_paused": {"is_paused": self.paused},
            "/weight_info": {"weight_version": "base"},
            "/reset_prefix_cache": {"success": self.drops},
            "/collective_rpc": {"results": [self._worker(body.get("method"))]},
            "/server_info": {
                "vllm_config": {
                    "parallel_config": {"worker_extension_cls": EXTENSION},
                    "lora_config": {} if self.takes_loras else None,
                },
                "vllm_env": {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": self.may_load},
            },
        }
        if what in answers:
            self.asked.append(path)
            return 200, answers[what]
        return super().answer(path, body)

    def _worker(self, method: object) -> dict[str, object]:
        error = self.says if method == "ckpt_check_lora" else None
        return {"rank": 0, "state": "none", "label": None, "error": error}

    def _load_in_place(self, name: str, folder: Path) -> tuple[int, object]:
        try:
            self.served[name] = load_file(folder / "adapter_model.safetensors")
        except FileNotFoundError as error:
            return 404, {"error": f"No adapter found for {error.filename}"}
        self.shown[name] = str(folder)
        if self.on_loaded:
            self.on_loaded(self, name, folder)
        return 200, "Success: LoRA adapter added successfully."
