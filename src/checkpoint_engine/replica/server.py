"""The HTTP face of a replica: OpenAI's completions, and the routes that swap its weights.

Handlers run on one event loop and never block it: whatever waits for the engine's thread or for
a transaction runs in a worker thread, so /health answers during an update. Generation and GET
routes are open, so they have worker threads of their own (Starlette's) and cannot keep an update
waiting (asyncio's). Routes that change something need the bearer token; without a token the
server may listen on loopback only, and refuses requests that a web page could have sent.

    check_binding(host, token)
    app = create_app(replica, token=token, model_name="m", device_uuid="GPU-x86_64")
    serve(app, host, port, ready=lambda port: ...)           # until SIGINT or SIGTERM
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Protocol

import msgspec
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from checkpoint_engine.compare import WeightDigests
from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, UsageError
from checkpoint_engine.replica.api import (
    CollectiveRpcRequest,
    CompletionBuilder,
    CompletionRequest,
    UpdateFromPathRequest,
    UpdateWeightsRequest,
    decode,
)
from checkpoint_engine.replica.disk import CheckpointFolders, PathNotAllowed
from checkpoint_engine.replica.engine import Engine, NotAccepting, QueueFull
from checkpoint_engine.replica.sequence import Event, Generation, GenerationRequest, Token

__all__ = ["ServedReplica", "check_binding", "create_app", "serve"]

MAX_BODY_BYTES = 1 << 20
HEAD_TIMEOUT_SECONDS = 10.0
BODY_TIMEOUT_SECONDS = 30.0
GENERATION_TIMEOUT_SECONDS = 3600.0  # longer than any operator's pause should be
SHUTDOWN_TIMEOUT_SECONDS = 10
UNHEALTHY_STATES = frozenset({"waiting", "quarantined", "torn"})


class ServedReplica(Protocol):
    """What the server needs of a replica. Methods block and are called in worker threads."""

    @property
    def engine(self) -> Engine:
        """What generates."""

    @property
    def state(self) -> str:
        """One of serving, updating, paused, waiting, quarantined, torn."""

    def info(self) -> Mapping[str, Any]:
        """weight_version, digest, served_digest, state and history, as JSON values."""

    def weight_digests(self, sample: float, seed: int) -> WeightDigests:
        """The digests of live tensors; with a sample below 1, of some, chosen by the seed."""

    def update(self, handle: str, *, weight_version: str | None, flush_cache: bool) -> None:
        """Take new weights from the control socket `handle`: the whole transaction.

        Raises:
            CheckpointEngineError: the replica serves what it served before, or its state says
                what became of it.
        """

    def pause(self) -> None:
        """Let requests wait from the next token boundary on."""

    def resume(self) -> None:
        """Let them go on."""


def check_binding(host: str, token: str | None) -> None:
    """Refuse to listen where strangers could change the weights.

    Raises:
        UsageError: `host` is beyond loopback, or a name that may be, and there is no token.
    """
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host.lower() == "localhost"
    if not is_loopback and not token:
        raise UsageError(
            f"listening on {host!r} without a token would let anyone change the weights; "
            "set a token, or listen on 127.0.0.1"
        )


def create_app(
    replica: ServedReplica,
    *,
    token: str | None,
    model_name: str,
    device_uuid: str,
    folders: CheckpointFolders | None = None,
) -> FastAPI:
    """The application.

    Args:
        replica: what it serves; its engine is started and stopped by the caller.
        token: what routes that change something require; None requires nothing.
        model_name: the name of the only model, in OpenAI's sense.
        device_uuid: the key under which update requests name this replica's control socket.
        folders: whose checkpoints it may be updated from; default none.
    """
    if token == "":
        raise UsageError("an empty token protects nothing; leave it out or set one")
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.include_router(_generation_routes(replica.engine, model_name))
    app.include_router(_status_routes(replica))
    checkpoints = folders or CheckpointFolders()
    app.include_router(_control_routes(replica, token, device_uuid, checkpoints))
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(CheckpointEngineError, _engine_error)
    return app


def serve(
    app: FastAPI, host: str, port: int, *, ready: Callable[[int], None] | None = None
) -> None:
    """Serve `app` until SIGINT or SIGTERM, then let requests in flight end, up to a deadline.

    Like uvicorn, it raises the signal again once it has shut down: a caller who wants to clean up
    after SIGTERM installs a handler that raises `SystemExit`.

    Args:
        app: from `create_app`.
        host: an address or name of this host; see `check_binding`.
        port: 0 picks a free one.
        ready: called once with the port when requests are answered.

    Raises:
        UsageError: the address is taken or not this host's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(f"cannot listen on {host} port {port}: {error}") from error
    config = uvicorn.Config(
        app,
        http=_Protocol,
        access_log=False,
        log_config=None,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_SECONDS,
    )
    with listener:
        _Server(config, ready).run(sockets=[listener])


class _Protocol(H11Protocol):
    """Hangs up on clients that begin no request, which uvicorn alone would wait for for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to watch a new connection."""
        super().connection_made(transport)
        self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._check_progress, None)

    def _check_progress(self, last: RequestResponseCycle | None) -> None:
        """Close unless a request is being answered, or one has begun since the `last`."""
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(HEAD_TIMEOUT_SECONDS, self._check_progress, self.cycle)


class _Server(uvicorn.Server):
    """Tells when requests are answered."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[int], None] | None) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then call `ready`."""
        await super().startup(sockets)
        if self._ready is not None and sockets:
            self._ready(sockets[0].getsockname()[1])


# Routes


def _generation_routes(engine: Engine, model_name: str) -> APIRouter:
    router = APIRouter(prefix="/v1")
    created = int(time.time())

    @router.post("/completions")
    async def completions(request: Request) -> Response:
        body = decode(await _read_body(request), CompletionRequest)
        if body.model not in (None, model_name):
            raise HTTPException(404, f"no model {body.model!r}; this server has {model_name!r}")
        prompts = [
            await run_in_threadpool(engine.encode, prompt) if isinstance(prompt, str) else prompt
            for prompt in body.prompts()
        ]
        generations = _submit_all(engine, body.generation_requests(prompts))
        completion = CompletionBuilder(body, prompts, model_name)
        if body.stream:
            return _EventStream(engine, generations, completion)
        return await _complete_unless_gone(request, engine, generations, completion)

    @router.get("/models")
    async def models() -> Response:
        model = {
            "id": model_name,
            "object": "model",
            "created": created,
            "owned_by": "ckpt-engine",
        }
        return _json({"object": "list", "data": [model]})

    return router


def _status_routes(replica: ServedReplica) -> APIRouter:
    router = APIRouter()
    # Anyone may ask, and hashing a model takes its time: at most one thread does it.
    hashing = asyncio.Lock()

    @router.get("/health")
    async def health() -> Response:
        state = replica.state
        return _json({"status": state}, status=503 if state in UNHEALTHY_STATES else 200)

    @router.get("/weight_info")
    async def weight_info() -> Response:
        async with hashing:
            return _json(await run_in_threadpool(replica.info))

    @router.get("/weight_digests")
    async def weight_digests(sample: float = 1.0, seed: int = 0) -> Response:
        async with hashing:
            return _json(await run_in_threadpool(replica.weight_digests, sample, seed))

    return router


def _control_routes(
    replica: ServedReplica, token: str | None, device_uuid: str, folders: CheckpointFolders
) -> APIRouter:
    async def authorize(request: Request) -> None:
        _authorize(request, token)

    router = APIRouter(dependencies=[Depends(authorize)])

    async def update(body: UpdateWeightsRequest) -> None:
        handle = body.zmq_handles.get(device_uuid)
        if handle is None:
            raise UsageError(
                f"no socket for device {device_uuid!r}; there are {sorted(body.zmq_handles)}"
            )
        await asyncio.to_thread(
            replica.update,
            handle,
            weight_version=body.weight_version,
            flush_cache=body.flush_cache,
        )

    def updated() -> Response:
        label = replica.engine.weight_version.version
        return _json({"success": True, "message": f"serving {label}", "weight_version": label})

    @router.post("/pause")
    async def pause() -> Response:
        await asyncio.to_thread(replica.pause)
        return _json({"success": True, "message": "paused"})

    @router.post("/resume")
    async def resume() -> Response:
        await asyncio.to_thread(replica.resume)
        return _json({"success": True, "message": "resumed"})

    @router.post("/update_weights_from_ipc")
    async def update_weights_from_ipc(request: Request) -> Response:
        await update(decode(await _read_body(request), UpdateWeightsRequest))
        return updated()

    @router.post("/update_weights_from_ckpt_engine")
    async def update_weights_from_ckpt_engine(request: Request) -> Response:
        body = decode(await _read_body(request), UpdateFromPathRequest)
        await asyncio.to_thread(folders.update, replica.update, body)
        return updated()

    @router.post("/collective_rpc")
    async def collective_rpc(request: Request) -> Response:
        await update(decode(await _read_body(request), CollectiveRpcRequest).update())
        return _json({"results": [None]})

    return router


def _authorize(request: Request, token: str | None) -> None:
    if token is None:
        # A page in a browser of this host can send requests here, but not without this header.
        if "origin" in request.headers:
            raise HTTPException(403, "requests from web pages need a token")
        return
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    # Header values are decoded as Latin-1, which keeps every byte.
    if scheme.lower() != "bearer" or not hmac.compare_digest(
        credentials.encode("latin-1"), token.encode()
    ):
        raise HTTPException(
            401, "this needs Authorization: Bearer <token>", {"WWW-Authenticate": "Bearer"}
        )


async def _read_body(request: Request) -> bytes:
    body = bytearray()

    async def read() -> None:
        async for chunk in request.stream():
            body.extend(chunk)
            if len(body) > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body exceeds {MAX_BODY_BYTES} bytes")

    try:
        await asyncio.wait_for(read(), BODY_TIMEOUT_SECONDS)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"no whole body after {BODY_TIMEOUT_SECONDS} s") from None
    return bytes(body)


# Generation


def _submit_all(engine: Engine, requests: list[GenerationRequest]) -> list[Generation]:
    """All of them, or none."""
    generations: list[Generation] = []
    try:
        for request in requests:
            generations.append(engine.submit(request))
    except CheckpointEngineError:
        _cancel_all(engine, generations)
        raise
    return generations


def _cancel_all(engine: Engine, generations: list[Generation]) -> None:
    for generation in generations:
        engine.cancel(generation)


async def _tokens(generations: list[Generation]) -> AsyncIterator[tuple[int, Token]]:
    """Every token of every generation as it comes, with the generation's index."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + GENERATION_TIMEOUT_SECONDS
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def listener(index: int) -> Callable[[Event], None]:
        def post(event: Event) -> None:
            # A loop that has closed has nobody left who listens.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, (index, event))

        return post

    for index, generation in enumerate(generations):
        generation.subscribe(listener(index))
    num_open = len(generations)
    while num_open:
        try:
            index, event = await asyncio.wait_for(events.get(), deadline - loop.time())
        except asyncio.TimeoutError:
            raise DeadlineExceeded(
                f"the request did not end within {GENERATION_TIMEOUT_SECONDS} s"
            ) from None
        if not isinstance(event, Token):
            raise event
        num_open -= event.finish_reason is not None
        yield index, event


async def _complete(generations: list[Generation], completion: CompletionBuilder) -> Response:
    async for index, token in _tokens(generations):
        completion.add(index, token)
    return _json(completion.build())


async def _complete_unless_gone(
    request: Request,
    engine: Engine,
    generations: list[Generation],
    completion: CompletionBuilder,
) -> Response:
    """The whole completion; the generations are cancelled when the client goes away."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.ensure_future(_complete(generations, completion))
    gone = asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        # The end of its generations ends the work too: nothing is left that nobody awaits.
        _cancel_all(engine, generations)
        gone.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


class _EventStream(StreamingResponse):
    """Server-sent events, one a token; the generations are cancelled when the client goes away.

    A stream that fails ends with an error in place of `[DONE]`, so that it never looks whole.
    """

    def __init__(
        self, engine: Engine, generations: list[Generation], completion: CompletionBuilder
    ) -> None:
        self._engine = engine
        self._generations = generations
        super().__init__(self._events(completion), media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            _cancel_all(self._engine, self._generations)

    async def _events(self, completion: CompletionBuilder) -> AsyncIterator[bytes]:
        try:
            async for index, token in _tokens(self._generations):
                yield _event(msgspec.json.encode(completion.add(index, token)))
        except CheckpointEngineError as error:
            yield _event(msgspec.json.encode(_openai_error(_status(error), str(error))))
        else:
            yield _event(b"[DONE]")


def _event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


# Responses


def _json(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status, headers, "application/json")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = _error_body(request, error.status_code, str(error.detail))
    return _json(body, status=error.status_code, headers=error.headers)


async def _engine_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, CheckpointEngineError)
    # The routes that take weights answer every other failure as SGLang does.
    weights_status = 403 if isinstance(error, PathNotAllowed) else 400
    status = _status(error) if request.url.path.startswith("/v1/") else weights_status
    return _json(_error_body(request, status, str(error)), status=status)


def _status(error: CheckpointEngineError) -> int:
    if isinstance(error, UsageError):
        return 400
    if isinstance(error, QueueFull):
        return 429
    if isinstance(error, NotAccepting):
        return 503
    return 504 if isinstance(error, DeadlineExceeded) else 500


def _error_body(request: Request, status: int, message: str) -> dict[str, Any]:
    if request.url.path.startswith("/v1/"):
        return _openai_error(status, message)
    return {"success": False, "message": message}


def _openai_error(status: int, message: str) -> dict[str, Any]:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if status == 429 else kind
    return {"error": {"message": message, "type": kind}}
