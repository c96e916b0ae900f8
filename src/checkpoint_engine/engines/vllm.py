"""vLLM: begun while it serves, finished while it is paused, and told what it serves.

    begin on every worker ─► all wait ─► pause, requests kept ─► finish ─► caches, label ─► resume

Its workers answer with data (`update.vllm`), and every answer is read: 200 says nothing. vLLM goes
on only when what it serves, its caches and its label agree; else it stays paused, and the error
says so. The next update that is published ends that.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import msgspec

from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.errors import MALFORMED, AdapterError

__all__ = ["Vllm"]

EXTENSION = "checkpoint_engine.worker.VllmColocateWorkerExtension"
POLL_SECONDS = 0.03
STEP_SECONDS = 60.0  # a step that is under way may be a long one
LOAD_LORA, UNLOAD_LORA = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
RESET_CACHE = "/reset_prefix_cache?reset_running_requests=true&reset_external=true"


class _Worker(msgspec.Struct):
    """What a worker answers: `update.background.Progress`."""

    rank: int
    state: str
    label: str | None
    error: str | None


class _Results(msgspec.Struct):
    results: list[_Worker]


class Vllm:
    """vLLM 0.32 and whatever has the same endpoints; see `Engine`."""

    name: ClassVar[str] = "vllm"

    def recognises(self, endpoint: Endpoint) -> bool:
        """By whom its model is owned."""
        return endpoint.owner() == "vllm"

    def check_lora(
        self, endpoint: Endpoint, name: str, folder: str, timeout_seconds: float
    ) -> None:
        """Every worker tries it; requests wait for that no longer than vLLM takes to load it."""
        _check_takes_loras(endpoint)
        workers = _call(endpoint, "ckpt_check_lora", [folder], timeout_seconds)
        if any(worker.error for worker in workers):
            raise AdapterError(_explain(endpoint, workers))

    def hold_loras(self, endpoint: Endpoint, timeout_seconds: float) -> bool:
        """Requests in flight wait, and go on afterwards; see `load_lora`.

        A vLLM that an update of its weights has left paused stays so: no adapter mends those.
        """
        return not _pause(endpoint)

    def load_lora(self, endpoint: Endpoint, name: str, folder: str, timeout_seconds: float) -> None:
        """What was cached, also by requests in flight, is computed again under the new adapter.

        Requests keep the path that they came with, and vLLM caches under that; so a version that
        comes back would find what they have cached under another.
        """
        body = {"lora_name": name, "lora_path": folder, "load_inplace": True}
        endpoint.tell(LOAD_LORA, body, timeout_seconds=timeout_seconds)
        _reset_prefix_cache(endpoint)

    def unload_lora(self, endpoint: Endpoint, name: str, timeout_seconds: float) -> bool:
        """Requests in flight go on with it, and may have it read again if it must make room."""
        if name in endpoint.loras():
            body = {"lora_name": name}
            endpoint.tell(UNLOAD_LORA, body, timeout_seconds=timeout_seconds)
        return False

    def drop_lora_caches(self, endpoint: Endpoint) -> None:
        """Also what requests in flight have cached; they go on with what was loaded last."""
        _reset_prefix_cache(endpoint)

    def let_go_loras(self, endpoint: Endpoint) -> None:
        """Resume."""
        endpoint.post("/resume", timeout_seconds=STEP_SECONDS)

    def update(
        self, endpoint: Endpoint, handles: Mapping[str, str], label: str, timeout_seconds: float
    ) -> None:
        """Requests in flight go on afterwards, with what they have generated so far."""
        _check_started_for_this(endpoint)
        is_held = _is_held(endpoint)
        begun = _call(endpoint, "ckpt_begin_update", [dict(handles)])
        if any(worker.error for worker in begun):  # what is under way may be somebody else's
            raise AdapterError(_explain(endpoint, begun))
        _wait_until_ready(endpoint, timeout_seconds)
        _pause(endpoint)
        workers = _finish(endpoint, timeout_seconds)
        if all(worker.state == "published" for worker in workers):
            _show(endpoint, label)
        elif any(worker.state != "kept" for worker in workers):
            raise AdapterError(f"{_explain(endpoint, workers)}; it stays paused: update it again")
        if not is_held:
            endpoint.post("/resume")
        _check(endpoint, workers)


def _check_started_for_this(endpoint: Endpoint) -> Any:
    """What it says of itself; raises unless it can be updated.

    Unknown methods must not be called: with more than one worker, that garbles later answers.
    """
    try:
        info = endpoint.get("/server_info?config_format=json", timeout_seconds=STEP_SECONDS)
    except AdapterError as error:
        raise AdapterError(
            f"{endpoint.url} does not let itself be updated: start vLLM with "
            f"VLLM_SERVER_DEV_MODE=1 and --worker-extension-cls {EXTENSION} ({error})"
        ) from error
    extension = info["vllm_config"]["parallel_config"]["worker_extension_cls"]
    if not extension.startswith("checkpoint_engine."):
        raise AdapterError(
            f"{endpoint.url} has the worker extension {extension!r}: start vLLM with "
            f"--worker-extension-cls {EXTENSION}"
        )
    return info


def _check_takes_loras(endpoint: Endpoint) -> None:
    info = _check_started_for_this(endpoint)
    may_load = info["vllm_env"]["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]
    if info["vllm_config"]["lora_config"] is None or not may_load:
        raise AdapterError(
            f"{endpoint.url} takes no LoRA adapters: start vLLM with --enable-lora, "
            "--max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
        )


def _is_held(endpoint: Endpoint) -> bool:
    """Whether somebody has paused it, and not an update that left it so."""
    if not endpoint.get("/is_paused")["is_paused"]:
        return False
    shown = endpoint.get("/weight_info")["weight_version"]
    last = _call(endpoint, "ckpt_update_state")
    unshown = any(worker.state == "published" and worker.label != shown for worker in last)
    return not unshown and all(worker.state != "torn" for worker in last)


def _wait_until_ready(endpoint: Endpoint, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        workers = _call(endpoint, "ckpt_update_state")
        states = {worker.state for worker in workers}
        if states == {"waiting"}:
            return
        if not states & {"preparing", "waiting"}:
            _check(endpoint, workers)
        if time.monotonic() > deadline:
            raise AdapterError(
                f"{endpoint.url}: its workers were not ready within {timeout_seconds:g} s "
                f"({', '.join(sorted(states))}); nothing has changed"
            )
        time.sleep(POLL_SECONDS)


def _pause(endpoint: Endpoint) -> bool:
    """Have requests wait; returns whether they did already, for whatever reason."""
    is_paused = bool(endpoint.get("/is_paused")["is_paused"])
    try:
        endpoint.post("/pause?mode=keep&clear_cache=false", timeout_seconds=STEP_SECONDS)
    except AdapterError:
        if not is_paused:
            with contextlib.suppress(AdapterError):  # it may be paused all the same, or be gone
                endpoint.post("/resume")
        raise
    return is_paused


def _finish(endpoint: Endpoint, timeout_seconds: float) -> list[_Worker]:
    try:
        return _call(endpoint, "ckpt_finish_update", timeout_seconds=timeout_seconds)
    except AdapterError:
        # It may have been published all the same, and must not go on under another label.
        return _call(endpoint, "ckpt_update_state", timeout_seconds=STEP_SECONDS)


def _show(endpoint: Endpoint, label: str) -> None:
    """What requests in flight had cached is computed again, under the new weights."""
    _reset_prefix_cache(endpoint)
    endpoint.post("/reset_encoder_cache", timeout_seconds=STEP_SECONDS)
    endpoint.post("/update_weight_version", {"new_version": label})


def _reset_prefix_cache(endpoint: Endpoint) -> None:
    if not endpoint.post(RESET_CACHE, timeout_seconds=STEP_SECONDS)["success"]:
        raise AdapterError(f"{endpoint.url} keeps its prefix cache; it stays paused")


def _call(
    endpoint: Endpoint,
    method: str,
    args: list[Any] | None = None,
    timeout_seconds: float = STEP_SECONDS,
) -> list[_Worker]:
    """Have every worker run a method. No `timeout` for vLLM: it would garble later answers."""
    body = {"method": method, "args": args or []}
    answer = endpoint.post("/collective_rpc", body, timeout_seconds=timeout_seconds)
    try:
        return msgspec.convert(answer, _Results).results
    except MALFORMED as error:
        raise AdapterError(f"{endpoint.url}: {method} answered {answer!r}: {error}") from error


def _check(endpoint: Endpoint, workers: list[_Worker]) -> None:
    if any(worker.state != "published" or worker.error for worker in workers):
        raise AdapterError(_explain(endpoint, workers))


def _explain(endpoint: Endpoint, workers: list[_Worker]) -> str:
    said = [f"worker {w.rank} ({w.state}): {w.error}" for w in workers if w.error]
    return f"{endpoint.url}: {'; '.join(said) or [worker.state for worker in workers]}"
