"""Which engine a rank calls, and what with.

An engine answers when the transaction is over for it, so a call lasts as long as the update, and
an error answer is a "no". How an engine of each kind is asked is in `engines`.

    requests = engine_requests(["http://127.0.0.1:8000"], rank=0, world_size=1)
    server.update("step-120", requests)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from importlib.metadata import entry_points
from typing import cast

from checkpoint_engine.engines.base import Engine
from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.engines.replica import Replica
from checkpoint_engine.errors import AdapterError, UsageError

__all__ = ["EngineRequest", "engine_requests", "request_inference_to_update"]

AUTO = "auto"
GROUP = "checkpoint_engine.engines"
BUILT_IN = {"replica": "Replica", "vllm": "Vllm", "sglang": "SGLang"}
ANY_ENGINES = "/collective_rpc"


class EngineRequest:
    """Makes one engine take an update: a `req_func` that is told the version's label, too.

    Args:
        endpoint: where the engine listens.
        ranks: whose handles it is given.
        engine: its kind; "auto" asks it, when it is first called.
        timeout_seconds: as for `Engine.update`.

    Attributes:
        endpoint: where the engine listens.
        ranks: whose handles it is given; the first is the rank that calls it.
    """

    def __init__(
        self, endpoint: Endpoint, ranks: slice, engine: str, timeout_seconds: float
    ) -> None:
        self.endpoint, self.ranks, self._name = endpoint, ranks, engine
        self._timeout_seconds = timeout_seconds

    def __call__(self, handles: Sequence[tuple[str, str]], label: str = "") -> None:
        """Returns when the update is over for this engine.

        Raises:
            AdapterError: it did not take it; says what it said.
        """
        mine = dict(handles[self.ranks])
        self.engine.update(self.endpoint, mine, label, self._timeout_seconds)

    @cached_property
    def engine(self) -> Engine:
        """Its kind.

        Raises:
            AdapterError: it does not answer, or is of no kind that is known here.
        """
        if self._name != AUTO:
            return _engine(self._name)
        for name in _names():
            engine = _engine(name)
            if engine.recognises(self.endpoint):
                return engine
        raise AdapterError(
            f"{self.endpoint.url} is no engine that is known here ({', '.join(_names())}); name "
            "its kind: --engine, or engine= of engine_requests"
        )


def request_inference_to_update(
    url: str, socket_paths: Mapping[str, str], timeout: float = 300.0, uds: str | None = None
) -> None:
    """Ask an engine's `/collective_rpc` to take an update, whatever kind it is.

    Args:
        url: the whole URL, such as "http://127.0.0.1:8000/collective_rpc".
        socket_paths: the handle for each of the engine's device uuids.
        timeout: seconds to wait for the answer, which comes when the update is over.
        uds: path of a Unix socket to send the request through.

    Raises:
        UsageError: it is no URL.
        AdapterError: the engine cannot be reached, or answered with an error; says what it said.
    """
    endpoint = Endpoint(url.removesuffix(ANY_ENGINES), uds=uds)
    Replica().update(endpoint, socket_paths, "", timeout)


def engine_requests(
    endpoints: Sequence[str],
    *,
    rank: int,
    world_size: int,
    inference_parallel_size: int = 1,
    timeout_seconds: float = 300.0,
    uds: str | None = None,
    engine: str = AUTO,
) -> list[EngineRequest]:
    """The calls that one rank of a parameter server makes, for `ParameterServer.update`.

    N engines of P ranks each are served by W ranks: W = N·P gives engine i the ranks i·P to
    i·P + P - 1, the first of which calls it; a single rank serves and calls every engine.

    Args:
        endpoints: URLs of the engines.
        rank: of the parameter server.
        world_size: of the parameter server.
        inference_parallel_size: ranks of each engine.
        timeout_seconds: until an engine's workers are ready.
        uds: path of a Unix socket to send requests through.
        engine: "auto" asks each engine what it is; else "vllm", "sglang", "replica", or the name of
            a third party's entry point.

    Raises:
        UsageError: the numbers fit neither way, there is no such engine, or one is no URL.
    """
    if engine != AUTO:
        _engine(engine)
    num_engines, parallel = len(endpoints), inference_parallel_size

    def call(url: str, ranks: slice) -> EngineRequest:
        return EngineRequest(Endpoint(url, uds=uds), ranks, engine, timeout_seconds)

    if world_size == 1:
        return [call(url, slice(0, 1)) for url in endpoints]
    if world_size != num_engines * parallel:
        raise UsageError(
            f"{world_size} ranks cannot serve {num_engines} engines of {parallel} ranks each: "
            f"start 1 rank or {num_engines * parallel}"
        )
    if rank % parallel:
        return []
    return [call(endpoints[rank // parallel], slice(rank, rank + parallel))]


def _names() -> list[str]:
    """Those of third parties first: whoever installs one wants it."""
    return [*(found.name for found in entry_points(group=GROUP)), *BUILT_IN]


def _engine(name: str) -> Engine:
    for found in entry_points(group=GROUP, name=name):
        return cast(Engine, found.load()())
    if name not in BUILT_IN:
        raise UsageError(f"--engine {name}: there are {AUTO}, {', '.join(_names())}")
    module = import_module(f"checkpoint_engine.engines.{name}")
    return cast(Engine, getattr(module, BUILT_IN[name])())
