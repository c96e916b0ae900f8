"""A client's side of the replica's API."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
from tiny_replica import TIMEOUT_SECONDS

PROMPT = [5, 17, 250, 3]
UPDATE = {"zmq_handles": {"GPU-test": "ipc:///new"}, "weight_version": "step-1"}


def body(**fields: Any) -> dict[str, Any]:
    defaults = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    return {**defaults, **fields}


def complete(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


@contextmanager
def streaming(http: httpx.Client, **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
    """The chunks of a stream; it must end with [DONE] if it is read to its end."""

    def chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
        events = [None]
        for line in response.iter_lines():
            if line:
                assert line.startswith("data: ")
                events.append(line.removeprefix("data: "))
                if events[-1] != "[DONE]":
                    yield msgspec.json.decode(events[-1])
        assert events[-1] == "[DONE]"

    with http.stream("POST", "/v1/completions", json=body(stream=True, **fields)) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        yield chunks(response)


def choices_of(chunks: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put the chunks of a stream together to what the whole response would have."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        (part,) = chunk["choices"]
        choice = choices.setdefault(
            part["index"], {"index": part["index"], "text": "", "token_ids": []}
        )
        choice["text"] += part["text"]
        choice["token_ids"] += part["token_ids"]
        choice["finish_reason"] = part["finish_reason"]
        choice["weight_versions"] = part["weight_versions"]
        if "prompt_token_ids" in part:
            choice["prompt_token_ids"] = part["prompt_token_ids"]
    return [choices[index] for index in sorted(choices)]


@contextmanager
def in_background(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """The result of `work` is in the list once the block has ended."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    yield results
    thread.join(TIMEOUT_SECONDS)
    assert results
