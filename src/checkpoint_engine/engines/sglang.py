"""SGLang: drained for a while, paused with requests put back, updated, looked at, and let go on.

    look ─► drain ─► pause (retract) ─► update, label, caches ─► look ─► continue

What it shows before and after says how an update ended, whatever was answered. After one that
failed, its label and the checksum of its weights must be as before. If they are neither that nor
the new version, it stays paused, and the error says so, until an update is published. After one
that succeeded the label is enough: requests would wait for the checksum of all weights.

Requests in flight are retracted: they keep what they have generated, and their caches are computed
again under the new weights. An `in_place` pause would keep the old caches, and SGLang then refuses
to drop them, although the weights have changed.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec

from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.errors import MALFORMED, AdapterError

__all__ = ["SGLang"]

DRAIN_SECONDS = 5.0  # unless CKPT_ENGINE_DRAIN_SECONDS says else
STEP_SECONDS = 60.0  # a step that is under way may be a long one
POLL_SECONDS = 0.05
TRIAL = ".ckpt-trial"
DOOR_SECONDS = 2.0
OK = 200


class _Load(msgspec.Struct):
    num_running_reqs: int
    num_waiting_reqs: int


class _Loads(msgspec.Struct):
    loads: list[_Load]


class _Info(msgspec.Struct):
    weight_version: str


class _Checksum(msgspec.Struct):
    per_engine_checksum: str


@dataclass(frozen=True)
class _Shown:
    """What a server says of its weights."""

    label: str
    checksum: str

    @classmethod
    def by(cls, endpoint: Endpoint, timeout_seconds: float) -> _Shown:
        """Ask; it answers when it is done with what it was asked before."""
        answer = endpoint.post(
            "/weights_checker", {"action": "checksum"}, timeout_seconds=timeout_seconds
        )
        checksum: str = _read(endpoint, answer, _Checksum).per_engine_checksum
        return cls(_label(endpoint), checksum)


class SGLang:
    """SGLang 0.5.23 and whatever has the same endpoints; see `Engine`."""

    name: ClassVar[str] = "sglang"

    def recognises(self, endpoint: Endpoint) -> bool:
        """By whom its model is owned."""
        return endpoint.owner() == "sglang"

    def check_lora(
        self, endpoint: Endpoint, name: str, folder: str, timeout_seconds: float
    ) -> None:
        """It loads it under another name for a moment; room in its memory pool is not needed."""
        if name.endswith(TRIAL):
            raise AdapterError(f"{name!r}: names that end in {TRIAL} are for trials alone")
        trial = f"{name}{TRIAL}"
        with contextlib.suppress(AdapterError):  # left by a trial that was killed
            _unload_lora(endpoint, trial, timeout_seconds)
        try:
            _load_lora(endpoint, trial, folder, timeout_seconds)
        except AdapterError as error:
            if "LoRA is not enabled" in str(error):
                raise AdapterError(
                    f"{endpoint.url} takes no LoRA adapters: start SGLang with --enable-lora, "
                    "--max-lora-rank and --lora-target-modules"
                ) from error
            raise
        _unload_lora(endpoint, trial, timeout_seconds)

    def hold_loras(self, endpoint: Endpoint, timeout_seconds: float) -> bool:
        """No: to replace an adapter it waits until those who use it have ended; see `load_lora`."""
        return False

    def load_lora(self, endpoint: Endpoint, name: str, folder: str, timeout_seconds: float) -> None:
        """Requests in flight end on the adapter before, and new ones for that name wait for it.

        Who comes between its unloading and its loading would load the one before again. So the
        door is closed until both are in line; if somebody was quicker all the same, once more.
        """
        deadline = time.monotonic() + timeout_seconds
        while (shown := endpoint.loras().get(name)) != folder:
            seconds = deadline - time.monotonic()
            if seconds < 0:
                raise AdapterError(
                    f"{endpoint.url}: {name!r} was not replaced within {timeout_seconds:g} s"
                )
            try:
                bring = _load_lora if shown is None else _replace_lora
                bring(endpoint, name, folder, seconds)
                break
            except AdapterError as error:
                if "already loaded" not in str(error):
                    raise

    def unload_lora(self, endpoint: Endpoint, name: str, timeout_seconds: float) -> bool:
        """Returns once nobody uses it. A request that came meanwhile has it loaded again.

        One may be at that while nothing is shown; so it is not asked whether there is something.
        """
        try:
            _unload_lora(endpoint, name, timeout_seconds)
        except AdapterError as error:
            if "does not exist" not in str(error):
                raise
        return True

    def drop_lora_caches(self, endpoint: Endpoint) -> None:
        """Nothing: what it caches is of one loading of an adapter, and never found by another."""

    def let_go_loras(self, endpoint: Endpoint) -> None:
        """Nothing: it was not kept waiting."""

    def update(
        self, endpoint: Endpoint, handles: Mapping[str, str], label: str, timeout_seconds: float
    ) -> None:
        """It goes on afterwards, also if it was paused before."""
        longest = 2 * timeout_seconds + STEP_SECONDS
        before = _Shown.by(endpoint, STEP_SECONDS)
        _drain(endpoint, _drain_seconds())
        _pause(endpoint, "retract")
        body = {"zmq_handles": dict(handles), "flush_cache": True, "weight_version": label}
        try:
            endpoint.post("/update_weights_from_ipc", body, timeout_seconds=longest)
        except AdapterError as error:
            after = _Shown.by(endpoint, longest)
            if after != before and after.label != label:
                raise AdapterError(
                    f"{error}; its weights are not those of {before.label!r}, which it shows: it "
                    "stays paused, update it again"
                ) from error
            _continue(endpoint)
            raise
        shown = _label(endpoint)
        if shown != label:
            raise AdapterError(
                f"{endpoint.url} shows {shown!r} after an update to {label!r} that it says "
                "has succeeded: it stays paused, update it again"
            )
        _continue(endpoint)


def _label(endpoint: Endpoint) -> str:
    info = endpoint.get("/model_info", timeout_seconds=STEP_SECONDS)
    label: str = _read(endpoint, info, _Info).weight_version
    return label


def _load_lora(endpoint: Endpoint, name: str, folder: str, timeout_seconds: float) -> None:
    body = {"lora_name": name, "lora_path": folder}
    endpoint.post("/load_lora_adapter", body, timeout_seconds=timeout_seconds)


def _unload_lora(endpoint: Endpoint, name: str, timeout_seconds: float) -> None:
    endpoint.post("/unload_lora_adapter", {"lora_name": name}, timeout_seconds=timeout_seconds)


def _pause(endpoint: Endpoint, mode: str) -> bool:
    """Have requests wait; returns whether they did already, for whatever reason."""
    is_paused = endpoint.status("/ready") != OK  # also if it is starting, or unhealthy
    try:
        endpoint.post("/pause_generation", {"mode": mode}, timeout_seconds=STEP_SECONDS)
    except AdapterError:
        if not is_paused:
            with contextlib.suppress(AdapterError):  # it may be paused all the same, or be gone
                _continue(endpoint)
        raise
    return is_paused


def _continue(endpoint: Endpoint) -> None:
    endpoint.post("/continue_generation", {}, timeout_seconds=STEP_SECONDS)


def _replace_lora(endpoint: Endpoint, name: str, folder: str, timeout_seconds: float) -> None:
    """SGLang does one after the other, and each only when nobody uses the adapter any more."""
    if endpoint.status("/ping") != OK:
        raise AdapterError(f"{endpoint.url} is unhealthy: {name!r} is not replaced meanwhile")
    with ThreadPoolExecutor(2) as pool:
        is_paused = _pause(endpoint, "in_place")
        try:
            if is_paused and _num_requests(endpoint):
                raise AdapterError(
                    f"{endpoint.url} is paused with requests in flight, which {name!r} cannot be "
                    "replaced before the end of: POST /continue_generation first"
                )
            unloading = pool.submit(_unload_lora, endpoint, name, timeout_seconds)
            deadline = time.monotonic() + DOOR_SECONDS  # somebody else's may be in line before
            while name in endpoint.loras() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            loading = pool.submit(_load_lora, endpoint, name, folder, timeout_seconds)
            time.sleep(POLL_SECONDS)
        finally:
            if not is_paused:
                _continue(endpoint)
        unloading.result()
        loading.result()


def _drain(endpoint: Endpoint, seconds: float) -> None:
    """Wait until no request is in flight, but no longer than this; new ones are still served."""
    deadline = time.monotonic() + seconds
    while _num_requests(endpoint) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _num_requests(endpoint: Endpoint) -> int:
    loads = _read(endpoint, endpoint.get("/v1/loads?include=core"), _Loads).loads
    return sum(load.num_running_reqs + load.num_waiting_reqs for load in loads)


def _drain_seconds() -> float:
    configured = os.environ.get("CKPT_ENGINE_DRAIN_SECONDS", str(DRAIN_SECONDS))
    try:
        return float(configured)
    except ValueError:
        raise AdapterError(f"CKPT_ENGINE_DRAIN_SECONDS={configured!r} is no number") from None


def _read(endpoint: Endpoint, answer: object, kind: Any) -> Any:
    try:
        return msgspec.convert(answer, kind)
    except MALFORMED as error:
        raise AdapterError(f"{endpoint.url} answered {answer!r}: {error}") from error
