"""The HTTP calls that make an engine take an update.

An engine answers when the transaction is over for it, so a call lasts as long as the update, and
an error answer is a "no".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence

import httpx

from checkpoint_engine.errors import AdapterError, UsageError

__all__ = ["engine_requests", "request_inference_to_update"]


def request_inference_to_update(
    url: str, socket_paths: Mapping[str, str], timeout: float = 300.0, uds: str | None = None
) -> None:
    """Ask an engine's `/collective_rpc` to take an update.

    Args:
        url: the whole URL, such as "http://127.0.0.1:8000/collective_rpc".
        socket_paths: the handle for each of the engine's device uuids.
        timeout: seconds to wait for the answer, which comes when the update is over.
        uds: path of a Unix socket to send the request through.

    Raises:
        AdapterError: the engine cannot be reached, or answered with an error; says what it said.
    """
    token = os.environ.get("CKPT_ENGINE_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    body = {"method": "update_weights_from_ipc", "args": [dict(socket_paths)], "timeout": timeout}
    # Reading the system's certificates takes longer than a small update; plain HTTP needs none.
    transport = httpx.HTTPTransport(uds=uds, verify=url.startswith("https:"))
    try:
        with httpx.Client(transport=transport, timeout=timeout) as client:
            response = client.post(url, json=body, headers=headers)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise AdapterError(f"{url}: {type(error).__name__}: {error}") from error
    if response.is_error:
        raise AdapterError(f"{url}: answered {response.status_code}: {response.text[:2000]}")


def engine_requests(
    endpoints: Sequence[str],
    *,
    rank: int,
    world_size: int,
    inference_parallel_size: int = 1,
    timeout_seconds: float = 300.0,
    uds: str | None = None,
) -> list[Callable[[Sequence[tuple[str, str]]], None]]:
    """The calls that one rank of a parameter server makes, for `ParameterServer.update`.

    N engines of P ranks each are served by W ranks: W = N·P gives engine i the ranks i·P to
    i·P + P - 1, the first of which calls it; a single rank serves and calls every engine.

    Raises:
        UsageError: the numbers fit neither way.
    """
    num_engines, parallel = len(endpoints), inference_parallel_size
    urls = [endpoint.rstrip("/") + "/collective_rpc" for endpoint in endpoints]

    def call(url: str, ranks: slice) -> Callable[[Sequence[tuple[str, str]]], None]:
        def request(handles: Sequence[tuple[str, str]]) -> None:
            request_inference_to_update(url, dict(handles[ranks]), timeout_seconds, uds)

        return request

    if world_size == 1:
        return [call(url, slice(0, 1)) for url in urls]
    if world_size != num_engines * parallel:
        raise UsageError(
            f"{world_size} ranks cannot serve {num_engines} engines of {parallel} ranks each: "
            f"start 1 rank or {num_engines * parallel}"
        )
    if rank % parallel:
        return []
    return [call(urls[rank // parallel], slice(rank, rank + parallel))]
