"""`ckpt-engine verify` and `diff` against real replicas over HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from safetensors.torch import save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner
from update_models import WAIT_SECONDS, flip, make_qwen3, running_replica, wait_until

from checkpoint_engine.cli.app import app
from checkpoint_engine.replica.replica import Replica
from checkpoint_engine.replica.scrub import scrubbing
from checkpoint_engine.replica.server import create_app

NAME = "model.layers.0.mlp.down_proj.weight"


@dataclass(frozen=True)
class Served:
    replica: Replica
    model: PreTrainedModel
    url: str

    def digests(self, **query: Any) -> httpx.Response:
        return httpx.get(f"{self.url}/weight_digests", params=query, timeout=WAIT_SECONDS)


Start = Callable[[PreTrainedModel], Served]


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:
        yield lambda model: stack.enter_context(serving(model))


@contextmanager
def serving(model: PreTrainedModel) -> Iterator[Served]:
    with running_replica(model) as replica:
        served = create_app(replica, token=None, model_name="m", device_uuid="GPU-test")
        server = uvicorn.Server(
            uvicorn.Config(served, port=0, log_config=None, lifespan="off", ws="none")
        )
        thread = threading.Thread(target=server.run)
        thread.start()
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Served(replica, model, f"http://127.0.0.1:{port}")
        server.should_exit = True
        thread.join(WAIT_SECONDS)


def save(model: PreTrainedModel, path: Path, *, leave_out: str = "") -> str:
    tensors = {k: v.clone() for k, v in model.state_dict().items() if k != leave_out}
    save_file(tensors, path)
    return str(path)


def run(*arguments: str) -> tuple[int, Any]:
    result = CliRunner().invoke(app, [*arguments, "--json"])
    return result.exit_code, json.loads(result.stdout)


def test_digests_are_of_the_live_parameters(start: Start) -> None:
    served = start(make_qwen3(1))
    before = served.digests().json()
    info = httpx.get(f"{served.url}/weight_info").json()
    assert (before["weight_version"], before["digest"]) == ("initial", info["served_digest"])
    assert [t["name"] for t in before["tensors"]] == sorted(served.model.state_dict())
    flip(served.model.get_parameter(NAME))
    after = served.digests().json()
    changed = [
        old["name"]
        for old, new in zip(before["tensors"], after["tensors"], strict=True)
        if old != new
    ]
    assert changed == [NAME]
    assert after["digest"] != before["digest"]


def test_a_replica_that_finds_a_flipped_bit_says_so(start: Start) -> None:
    served = start(make_qwen3(1))
    assert httpx.get(f"{served.url}/health").status_code == 200
    flip(served.model.get_parameter(NAME))
    with scrubbing(served.replica, pass_seconds=0.05):
        wait_until(lambda: httpx.get(f"{served.url}/health").status_code == 503)
    info = httpx.get(f"{served.url}/weight_info").json()
    assert info["state"] == "torn"
    assert NAME in info["reason"]
    response = httpx.post(f"{served.url}/v1/completions", json={"prompt": [1, 2]})
    assert response.status_code == 503
    assert NAME in response.text


def test_a_sample_is_of_about_its_share_and_alike_on_every_replica(start: Start) -> None:
    first, second = start(make_qwen3(1)), start(make_qwen3(1))
    whole = {t["name"]: t["digest"] for t in first.digests().json()["tensors"]}
    samples = []
    for seed in range(4):
        answer = first.digests(sample=0.3, seed=seed).json()
        assert second.digests(sample=0.3, seed=seed).json() == answer
        digested = [t for t in answer["tensors"] if t.get("digest")]
        assert all(whole[t["name"]] == t["digest"] for t in digested)
        assert len(answer["tensors"]) == len(whole)
        assert 0 < len(digested) < len(whole)
        samples.append(frozenset(t["name"] for t in digested))
    assert len(set(samples)) > 1, "the seed chooses nothing"


@pytest.mark.parametrize("query", ["sample=0", "sample=1.1", "sample=nan", "seed=x"])
def test_what_is_no_sample_is_refused(start: Start, query: str) -> None:
    served = start(make_qwen3(1))
    assert httpx.get(f"{served.url}/weight_digests?{query}").status_code in (400, 422)


def test_replicas_and_their_checkpoint_are_equal(start: Start, tmp_path: Path) -> None:
    urls = [start(make_qwen3(1)).url for _ in range(2)]
    path = save(make_qwen3(1), tmp_path / "model.safetensors")
    for place in (path, str(tmp_path)):
        code, answer = run("verify", "-e", urls[0], "-e", urls[1], "--checkpoint-path", place)
        assert (code, answer["equal"]) == (0, True)
    num_bytes = sum(tensor.nbytes for tensor in make_qwen3(1).state_dict().values())
    assert [row["num_bytes"] for row in answer["endpoints"]] == [num_bytes] * 2


def test_the_replica_that_differs_is_named_with_its_tensor(start: Start, tmp_path: Path) -> None:
    good, bad = start(make_qwen3(1)), start(make_qwen3(1))
    flip(bad.model.get_parameter(NAME), index=5)
    path = save(make_qwen3(1), tmp_path / "model.safetensors")
    third = start(make_qwen3(1)).url
    for more in (["--checkpoint-path", path], ["-e", third]):
        code, answer = run("verify", "-e", bad.url, "-e", good.url, *more)
        assert (code, answer["equal"]) == (5, False)
        assert [row["verdict"] for row in answer["endpoints"]][:2] == ["different", "equal"]
        assert answer["endpoints"][0]["different"] == [f"{NAME} differs"]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, ["verify", "-e", bad.url, "-e", good.url, "-e", third]
    )
    assert f"{bad.url}: {NAME} differs" in result.stdout


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_is_compared_after_the_cast_of_an_update(
    start: Start, tmp_path: Path, dtype: torch.dtype
) -> None:
    served = start(make_qwen3(1).to(dtype))
    path = save(make_qwen3(1), tmp_path / "model.safetensors")
    assert run("verify", "-e", served.url, "--checkpoint-path", path)[0] == 0
    flip(served.model.get_parameter(NAME))
    assert run("verify", "-e", served.url, "--checkpoint-path", path)[0] == 5


def test_a_tied_tensor_may_be_in_the_checkpoint_once(start: Start, tmp_path: Path) -> None:
    served = start(make_qwen3(1, tie_word_embeddings=True))
    path = save(served.model, tmp_path / "model.safetensors", leave_out="lm_head.weight")
    code, answer = run("verify", "-e", served.url, "--checkpoint-path", path)
    assert (code, answer["endpoints"][0]["different"]) == (0, [])
    path = save(served.model, tmp_path / "less.safetensors", leave_out=NAME)
    code, answer = run("verify", "-e", served.url, "--checkpoint-path", path)
    assert (code, answer["endpoints"][0]["different"]) == (5, [f"{NAME} is not expected"])


def test_a_checkpoint_may_hold_buffers_that_the_model_leaves_alone(
    start: Start, tmp_path: Path
) -> None:
    served = start(make_qwen3(1))
    tensors = dict(served.model.state_dict())
    tensors["model.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    path = str(tmp_path / "model.safetensors")
    assert run("verify", "-e", served.url, "--checkpoint-path", path)[0] == 0
    tensors["extra"] = torch.zeros(8)
    save_file(tensors, tmp_path / "model.safetensors")
    code, answer = run("verify", "-e", served.url, "--checkpoint-path", path, "--sample", "0.1")
    assert (code, answer["endpoints"][0]["different"]) == (5, ["extra is missing"])


def test_a_sample_finds_what_is_in_it(start: Start) -> None:
    good, bad = start(make_qwen3(1)), start(make_qwen3(1))
    flip(bad.model.get_parameter(NAME))
    endpoints = ["-e", good.url, "-e", bad.url]
    found = set()
    for seed in range(12):
        code, answer = run("verify", *endpoints, "--sample", "0.3", "--seed", str(seed))
        digested = good.digests(sample=0.3, seed=seed).json()["tensors"]
        sampled = any(t["name"] == NAME and t.get("digest") for t in digested)
        assert code == (5 if sampled else 0)
        assert answer["seed"] == seed
        found.add(sampled)
    assert found == {True, False}


def test_a_replica_that_does_not_answer_is_a_failure_and_a_difference_outweighs_it(
    start: Start,
) -> None:
    good, bad = start(make_qwen3(1)), start(make_qwen3(2))
    gone = "http://127.0.0.1:1"
    code, answer = run("verify", "-e", good.url, "-e", gone)
    assert (code, answer["equal"]) == (1, False)
    assert [row["verdict"] for row in answer["endpoints"]] == ["equal", "no answer"]
    assert answer["endpoints"][1]["note"] == "Connection refused"
    assert run("verify", "-e", good.url, "-e", gone, "-e", bad.url)[0] == 5


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-e", "http://127.0.0.1:1"],
        ["--checkpoint-path", "x"],
        ["-e", "http://127.0.0.1:1", "-e", "http://127.0.0.1:2", "--sample", "0"],
    ],
)
def test_nothing_to_compare(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["verify", *arguments]).exit_code == 2


def test_replicas_can_be_diffed_with_each_other_and_with_a_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    first, second = start(make_qwen3(1)), start(make_qwen3(1))
    flip(second.model.get_parameter(NAME))
    path = save(make_qwen3(1), tmp_path / "model.safetensors")
    for sides in [(first.url, second.url), (path, second.url), (second.url, path)]:
        code, answer = run("diff", *sides)
        assert code == 0
        assert [t["name"] for t in answer["tensors"] if t["kind"] == "changed"] == [NAME]
        assert answer["tensors"][0]["name"] == NAME
        assert answer["counts"]["equal"] == len(answer["tensors"]) - 1
    assert run("diff", first.url, path)[1]["counts"] == {"equal": len(answer["tensors"])}


def test_a_diff_with_a_replica_that_is_gone_fails(start: Start) -> None:
    arguments = ["diff", start(make_qwen3(1)).url, "http://127.0.0.1:1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "http://127.0.0.1:1: Connection refused" in result.stderr
