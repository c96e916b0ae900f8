from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from replica_client import PROMPT, UPDATE, body, choices_of, complete, in_background, streaming
from tiny_replica import TIMEOUT_SECONDS, Gate, StandInReplica, greedy, wait_until
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_engine.errors import UsageError
from checkpoint_engine.replica.engine import Engine
from checkpoint_engine.replica.server import create_app, serve

# Generation


def test_a_completion_is_openais_and_says_which_weights_made_it(
    http: httpx.Client, old: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    completion = complete(http)
    expected = greedy(old, PROMPT, 20)
    assert completion["object"] == "text_completion"
    assert completion["id"].startswith("cmpl-")
    assert completion["model"] == "tiny"
    assert completion["choices"] == [
        {
            "index": 0,
            "text": tokenizer.decode(expected),
            "finish_reason": "length",
            "weight_versions": [
                {"version": "old", "digest": "digest of old", "start": 0, "end": 20}
            ],
            "token_ids": expected,
            "prompt_token_ids": PROMPT,
        }
    ]
    assert completion["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 20,
        "total_tokens": 24,
    }


def test_token_ids_come_only_when_asked_for(http: httpx.Client) -> None:
    (choice,) = complete(http, return_token_ids=False)["choices"]
    assert choice.keys() == {"index", "text", "finish_reason", "weight_versions"}


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "seed": 5, "temperature": 1.0},
        {"prompt": ["The weights", "A replica"], "n": 2, "seed": 1, "temperature": 0.7},
        {"prompt": "ein Satz 🙂", "stop": ["e", "qq"], "max_tokens": 80},
        {"prompt": [[1, 2], [3]], "top_p": 0.5, "seed": 3, "temperature": 2},
    ],
)
def test_a_stream_put_together_is_the_whole_response(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    whole = complete(http, **fields)
    with streaming(http, **fields) as chunks:
        assert choices_of(chunks) == whole["choices"]


def test_every_chunk_names_the_weights_of_its_token(http: httpx.Client) -> None:
    with streaming(http, max_tokens=4) as chunks:
        spans = [
            [(span["start"], span["end"]) for span in chunk["choices"][0]["weight_versions"]]
            for chunk in chunks
        ]
    assert spans == [[(0, 1)], [(1, 2)], [(2, 3)], [(0, 4)]]


def test_a_prompt_may_be_text_texts_tokens_or_lists_of_tokens(
    http: httpx.Client, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = ["The weights", "A replica"]
    token_ids = [tokenizer.encode(text) for text in texts]
    singly = [complete(http, prompt=text)["choices"][0] for text in texts]
    assert complete(http, prompt=token_ids[0])["choices"] == [singly[0]]
    for prompt in (texts, token_ids):
        choices = complete(http, prompt=prompt)["choices"]
        assert choices == [singly[0], {**singly[1], "index": 1}]


def test_choices_differ_and_a_seed_repeats_them(http: httpx.Client) -> None:
    def sampled(seed: int) -> list[list[int]]:
        choices = complete(http, n=3, seed=seed, temperature=1.0)["choices"]
        return [choice["token_ids"] for choice in choices]

    first = sampled(seed=10)
    assert first == sampled(seed=10)
    assert len({tuple(tokens) for tokens in first}) == 3
    assert sampled(seed=11)[0] == first[1], "choice i of seed s is choice 0 of seed s + i"


def test_a_stream_never_shows_a_part_of_a_stop_string(http: httpx.Client) -> None:
    text = complete(http, max_tokens=60)["choices"][0]["text"]
    stop = text[20:26]
    expected = text[: text.index(stop)]
    shown = ""
    with streaming(http, max_tokens=60, stop=stop) as chunks:
        for chunk in chunks:
            (choice,) = chunk["choices"]
            shown += choice["text"]
            assert expected.startswith(shown)
    assert (shown, choice["finish_reason"]) == (expected, "stop")


def test_sixteen_clients_at_once(http: httpx.Client, old: PreTrainedModel) -> None:
    prompts = [[i + 1, 100 + i] for i in range(16)]
    with ThreadPoolExecutor(16) as threads:
        completions = list(
            threads.map(lambda prompt: complete(http, prompt=prompt, max_tokens=8), prompts)
        )
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion["choices"][0]["token_ids"] == greedy(old, prompt, 8)


def test_a_client_that_goes_away_frees_its_sequences(
    http: httpx.Client, engine: Engine, gate: Gate
) -> None:
    def is_freed() -> bool:
        gate.close(num_permits=1)  # the one within its pass ends after it
        return engine.num_running == 0

    gate.close(num_permits=8)
    with streaming(http, n=4, max_tokens=900) as chunks:
        next(chunks)
        assert engine.num_running + engine.num_waiting == 4
    wait_until(is_freed)

    num_passes = len(gate.num_inputs)
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json=body(max_tokens=900), timeout=0.5)
    wait_until(lambda: is_freed() and len(gate.num_inputs) > num_passes)
    assert len(gate.num_inputs) < 900


# Swaps


@pytest.mark.parametrize("route", ["/update_weights_from_ipc", "/collective_rpc"])
def test_a_stream_goes_on_across_a_swap_and_names_both_versions(
    http: httpx.Client,
    engine: Engine,
    gate: Gate,
    old: PreTrainedModel,
    new: PreTrainedModel,
    route: str,
) -> None:
    handles = UPDATE["zmq_handles"]
    rpc = {"method": "update_weights_from_ipc", "args": [handles], "timeout": 60}
    label = "ipc:///new" if route == "/collective_rpc" else "step-1"
    gate.close(num_permits=15)
    with streaming(http, max_tokens=50) as chunks:
        seen = [next(chunks) for _ in range(15)]
        update = rpc if route == "/collective_rpc" else UPDATE
        with in_background(lambda: http.post(route, json=update)) as responses:
            wait_until(lambda: engine.paused)
            gate.open()
        (choice,) = choices_of(iter([*seen, *chunks]))

    assert responses[0].status_code == 200
    success = {"success": True, "message": "serving step-1", "weight_version": "step-1"}
    expected = {"results": [None]} if route == "/collective_rpc" else success
    assert responses[0].json() == expected
    boundary = choice["weight_versions"][0]["end"]
    assert boundary in (15, 16)
    assert choice["weight_versions"] == [
        {"version": "old", "digest": "digest of old", "start": 0, "end": boundary},
        {"version": label, "digest": "digest of ipc:///new", "start": boundary, "end": 50},
    ]
    made_before = greedy(old, PROMPT, boundary)
    made_after = greedy(new, PROMPT + made_before, 50 - boundary)
    assert choice["token_ids"] == made_before + made_after


def test_during_an_update_the_server_answers_and_refuses_a_second(
    http: httpx.Client, replica: StandInReplica
) -> None:
    replica.may_finish.clear()
    with in_background(lambda: http.post("/update_weights_from_ipc", json=UPDATE)) as responses:
        assert replica.updating.wait(TIMEOUT_SECONDS)
        assert http.get("/health").status_code == 200
        second = http.post("/update_weights_from_ipc", json=UPDATE)
        with in_background(lambda: complete(http)) as completions:
            wait_until(lambda: replica.engine.num_waiting == 1)
            replica.may_finish.set()
    assert second.status_code == 400
    assert second.json() == {"success": False, "message": "an update is running"}
    assert responses[0].json()["success"] is True
    (span,) = completions[0]["choices"][0]["weight_versions"]
    assert span["version"] == "step-1"


def test_pause_stops_the_tokens_and_resume_goes_on(
    http: httpx.Client, engine: Engine, gate: Gate, old: PreTrainedModel
) -> None:
    gate.close(num_permits=5)
    with streaming(http, max_tokens=30) as chunks:
        seen = [next(chunks) for _ in range(5)]
        with in_background(lambda: http.post("/pause")) as responses:
            wait_until(lambda: engine.paused)
            gate.open()
        assert responses[0].json() == {"success": True, "message": "paused"}
        assert http.get("/health").json() == {"status": "paused"}
        num_passes = len(gate.num_inputs)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body(), timeout=0.2)
        assert len(gate.num_inputs) == num_passes
        assert http.post("/resume").json() == {"success": True, "message": "resumed"}
        (choice,) = choices_of(iter([*seen, *chunks]))
    assert choice["token_ids"] == greedy(old, PROMPT, 30)


def test_a_failed_update_is_a_400_and_changes_nothing(
    http: httpx.Client, old: PreTrainedModel
) -> None:
    for route, update in (
        ("/update_weights_from_ipc", {"zmq_handles": {"GPU-test": "ipc:///gone"}}),
        (
            "/collective_rpc",
            {"method": "update_weights_from_ipc", "args": [{"GPU-test": "ipc:///gone"}]},
        ),
    ):
        response = http.post(route, json=update)
        assert response.status_code == 400
        assert response.json() == {
            "success": False,
            "message": "nothing listens on 'ipc:///gone'",
        }
    (choice,) = complete(http)["choices"]
    assert choice["token_ids"] == greedy(old, PROMPT, 20)
    assert [span["version"] for span in choice["weight_versions"]] == ["old"]


# Status


def test_the_model_is_listed(http: httpx.Client) -> None:
    listing = http.get("/v1/models").json()
    assert listing["object"] == "list"
    assert [model["id"] for model in listing["data"]] == ["tiny"]


def test_health_is_red_while_no_version_can_be_served(
    http: httpx.Client, replica: StandInReplica
) -> None:
    for replica.state in ("serving", "updating", "paused"):
        response = http.get("/health")
        assert (response.status_code, response.json()) == (200, {"status": replica.state})
    for replica.state in ("waiting", "quarantined", "torn"):
        response = http.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": replica.state})


def test_only_one_thread_hashes_however_many_ask(
    http: httpx.Client, replica: StandInReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, may_answer = threading.Semaphore(0), threading.Semaphore(0)

    def info() -> dict[str, Any]:
        asked.release()
        assert may_answer.acquire(timeout=TIMEOUT_SECONDS)
        return {}

    monkeypatch.setattr(replica, "info", info)
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(http.get, "/weight_info") for _ in range(4)]
        for _ in answers:
            assert asked.acquire(timeout=TIMEOUT_SECONDS)
            assert http.get("/health").status_code == 200
            assert not asked.acquire(blocking=False)
            may_answer.release()
        assert [answer.result().status_code for answer in answers] == [200] * 4


def test_weight_info_names_what_is_served(http: httpx.Client) -> None:
    http.post("/update_weights_from_ipc", json=UPDATE)
    assert http.get("/weight_info").json() == {
        "weight_version": "step-1",
        "digest": "digest of ipc:///new",
        "served_digest": "served",
        "state": "serving",
        "history": [],
    }


# The server process


SERVER = """
import sys
from tiny_replica import StandInReplica, make_model, make_tokenizer
from checkpoint_engine.replica.engine import Engine
from checkpoint_engine.replica.server import create_app, serve

model = make_model(seed=1)
engine = Engine(model, make_tokenizer())
engine.set_version("old", "digest of old")
engine.start()
replica = StandInReplica(engine, model)
app = create_app(replica, token=None, model_name="tiny", device_uuid="GPU-test")
serve(app, "127.0.0.1", 0, ready=lambda port: print(port, flush=True))
"""


def test_a_terminated_server_ends_its_streams_first(old: PreTrainedModel) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SERVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        with (
            httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=TIMEOUT_SECONDS) as http,
            streaming(http, max_tokens=150) as chunks,
        ):
            seen = [next(chunks)]
            process.send_signal(signal.SIGTERM)
            (choice,) = choices_of(iter([*seen, *chunks]))
        _, errors = process.communicate(timeout=TIMEOUT_SECONDS)
    assert choice["token_ids"] == greedy(old, PROMPT, 150)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")


def test_a_taken_port_is_a_users_error(http: httpx.Client, replica: StandInReplica) -> None:
    app = create_app(replica, token=None, model_name="tiny", device_uuid="GPU-test")
    with pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1"):
        serve(app, "127.0.0.1", http.base_url.port or 0)
