"""The main job in one command: train, serve, update, and prove that it arrived.

A trainer in this process changes a model's weights; replicas in processes of their own serve
it, answer requests all the while, and produce the rollouts that the next step learns from. After
every step one transaction brings them to the new weights. What happens is told as events, for
whoever shows them.

    result = run_demo(steps=10, num_replicas=2, seed=0, tell=print)
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import cast

import msgspec
import torch

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.demo.chaos import Chaos, check_chaos
from checkpoint_engine.demo.fleet import Fleet, Replica, Traffic, new_token
from checkpoint_engine.demo.trainer import Rollout, Trainer
from checkpoint_engine.errors import AdapterError, UpdateFailed
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.timeline import Span, Timeline
from checkpoint_engine.update.conductor import Request
from checkpoint_engine.update.protocol import Report

__all__ = [
    "DemoResult",
    "Event",
    "Pretraining",
    "ReplicaResult",
    "Serving",
    "StepDone",
    "UpdateResult",
    "run_demo",
]

PRETRAIN_SECONDS = 8.0
NUM_PROMPTS = 8
SAMPLES_PER_PROMPT = 4
ROLLOUT_TOKENS = 24
GREEDY_TOKENS = 16
UPDATE_TIMEOUT = timedelta(seconds=60)


class Pretraining(msgspec.Struct, frozen=True):
    """Next-token training goes on."""

    step: int
    loss: float
    seconds: float
    total_seconds: float


class Serving(msgspec.Struct, frozen=True):
    """The replicas serve."""

    endpoints: tuple[str, ...]
    num_parameters: int


class StepDone(msgspec.Struct, frozen=True):
    """One policy-gradient step, and the update that carried it to the replicas."""

    step: int
    reward: float
    sample: str
    report: Report
    update_seconds: float
    digests: dict[str, str]
    trouble: str = ""


Event = Pretraining | Serving | StepDone


class ReplicaResult(msgspec.Struct, frozen=True):
    """A replica at the end, and whether it says, greedily, what the trainer says."""

    name: str
    version: str
    digest: str
    outputs_match: bool


class UpdateResult(msgspec.Struct, frozen=True):
    """One update, in short."""

    version: str
    digest: str
    mode: str
    outcome: str
    bytes: int
    bytes_sent: int
    seconds: dict[str, float]
    pause_seconds: float | None
    verified: bool

    @classmethod
    def of(cls, report: Report) -> UpdateResult:
        """The part of a report that a reader of the demo needs."""
        return cls(**{name: getattr(report, name) for name in cls.__struct_fields__})


class DemoResult(msgspec.Struct, frozen=True):
    """What `--report` writes, and the spans of all updates for `--trace`."""

    replicas: tuple[ReplicaResult, ...]
    updates: tuple[UpdateResult, ...]
    rewards: tuple[float, ...]
    num_requests: int
    num_requests_failed: int
    num_requests_cut_off: int
    num_requests_across_versions: int
    failures: tuple[str, ...]
    spans: tuple[Span, ...]


def run_demo(
    *,
    steps: int,
    num_replicas: int,
    seed: int,
    tell: Callable[[Event], None],
    chaos: bool = False,
) -> DemoResult:
    """Run the demo; see the module's text.

    Args:
        steps: policy-gradient steps, each followed by an update.
        num_replicas: replica processes.
        seed: of the model, the text batches and the rollouts.
        tell: called with each event, on this thread.
        chaos: let a replica refuse an update, and kill one in the middle of another.

    Raises:
        UpdateFailed: an update was not published.
        PeerLost: a replica died.
        UsageError: too few steps or replicas for chaos.
    """
    if chaos:
        check_chaos(steps, num_replicas)
    torch.set_num_threads(1)  # the replicas need the other cores
    trainer = Trainer(seed)
    timeline = Timeline("trainer")
    with tempfile.TemporaryDirectory(prefix="ckpt-engine-demo-") as folder:
        root = Path(folder)
        with timeline.span("pretrain"):
            _pretrain(trainer, tell)
        trainer.save(root / "model")
        token = os.environ["CKPT_ENGINE_TOKEN"] = new_token()
        prompts = trainer.prompts(NUM_PROMPTS)
        server = ParameterServer(rank=0, world_size=1)
        try:
            with Fleet(
                root / "model", num_replicas=num_replicas, log_dir=root, token=token
            ) as fleet:
                num_parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
                tell(Serving(tuple(fleet.endpoints), num_parameters))
                with Traffic(fleet, prompts) as traffic:
                    plan = _Plan(trainer, server, fleet, prompts, timeline, chaos)
                    done = plan.train(steps, tell)
                replicas = _compare(trainer, fleet.replicas, prompts)
        finally:
            server.close()
    return DemoResult(
        replicas=replicas,
        updates=tuple(UpdateResult.of(step.report) for step in done),
        rewards=tuple(step.reward for step in done),
        num_requests=traffic.num_answered,
        num_requests_failed=traffic.num_failed,
        num_requests_cut_off=traffic.num_cut_off,
        num_requests_across_versions=traffic.num_across_versions,
        failures=tuple(traffic.failures[:10]),
        spans=(*timeline.spans, *(span for step in done for span in step.report.spans)),
    )


def _pretrain(trainer: Trainer, tell: Callable[[Event], None]) -> None:
    start = time.monotonic()

    def on_progress(step: int, loss: float) -> None:
        tell(Pretraining(step, loss, time.monotonic() - start, PRETRAIN_SECONDS))

    trainer.pretrain(PRETRAIN_SECONDS, on_progress)


@dataclass(frozen=True)
class _Plan:
    """Training with its replicas, step by step."""

    trainer: Trainer
    server: ParameterServer
    fleet: Fleet
    prompts: Sequence[tuple[int, ...]]
    timeline: Timeline
    chaos: bool

    def train(self, steps: int, tell: Callable[[Event], None]) -> list[StepDone]:
        requests = engine_requests(self.fleet.endpoints, rank=0, world_size=1)
        trouble = Chaos(self.fleet, requests) if self.chaos else None
        done: list[StepDone] = []
        for step in range(1, steps + 1):
            done.append(self._step(step, trouble.requests(step) if trouble else requests))
            if trouble:
                done[-1] = msgspec.structs.replace(done[-1], trouble=trouble.settle(step))
            tell(done[-1])
        return done

    def _step(self, step: int, requests: Sequence[Request]) -> StepDone:
        with self.timeline.span("rollouts", f"step {step}"):
            rollouts = _roll_out(self.fleet.replicas, self.prompts, step)
        with self.timeline.span("policy step", f"step {step}"):
            reward = self.trainer.policy_step(rollouts)
        start = time.monotonic()
        report = self._update(f"step-{step}", requests)
        seconds = time.monotonic() - start
        digests = {r.name: str(r.weight_info()["digest"]) for r in self.fleet.alive}
        sample = self.trainer.decode(max(rollouts, key=self.trainer.reward).token_ids)
        return StepDone(step, reward, sample, report, seconds, digests)

    def _update(self, label: str, requests: Sequence[Request]) -> Report:
        with self.timeline.span("register", label):
            self.server.register_checkpoint(
                label, named_tensors=self.trainer.state_dict(), use_shared_memory_pool=True
            )
            self.server.gather_metas(label)
        with self.timeline.span("update", label):
            try:
                return self.server.update(label, requests, timeout=UPDATE_TIMEOUT)
            except UpdateFailed as failure:
                if not self.chaos:
                    raise
                return cast(Report, failure.report)


def _roll_out(
    replicas: Sequence[Replica], prompts: Sequence[tuple[int, ...]], step: int
) -> list[Rollout]:
    """Samples from all replicas at temperature 1, each of which takes its share of the prompts."""

    def sample(replica: Replica, share: Sequence[tuple[int, ...]]) -> list[Rollout]:
        choices = replica.generate(
            share, max_tokens=ROLLOUT_TOKENS, temperature=1.0, n=SAMPLES_PER_PROMPT, seed=step
        )
        if len(choices) != len(share) * SAMPLES_PER_PROMPT:
            raise AdapterError(f"{replica.name} answered {len(choices)} choices")
        return [
            Rollout(share[number // SAMPLES_PER_PROMPT], tuple(choice["token_ids"]))
            for number, choice in enumerate(choices)
        ]

    shares = [prompts[number :: len(replicas)] for number in range(len(replicas))]
    with ThreadPoolExecutor(len(replicas)) as pool:
        answers = pool.map(sample, replicas, shares)
        return [rollout for answer in answers for rollout in answer]


def _compare(
    trainer: Trainer, replicas: Sequence[Replica], prompts: Sequence[tuple[int, ...]]
) -> tuple[ReplicaResult, ...]:
    own = [trainer.greedy(prompt, GREEDY_TOKENS) for prompt in prompts]
    results = []
    for replica in replicas:
        choices = replica.generate(prompts, max_tokens=GREEDY_TOKENS, temperature=0.0)
        theirs = [tuple(choice["token_ids"]) for choice in choices]
        info = replica.weight_info()
        results.append(
            ReplicaResult(replica.name, info["weight_version"], info["digest"], theirs == own)
        )
    return tuple(results)
