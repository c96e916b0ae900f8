"""A trainer and its samplers as plain processes, each with a manager of its own.

    torchrun --standalone --nproc-per-node 4 examples/sync_samplers.py

Rank 0 trains, the others sample. Before they sample, all of them serve the trainer's weights, or
the step has failed everywhere. The reward is 1 for the action that has the context's number: a
policy that knows nothing gets 1 in 8.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist

from checkpoint_engine import CheckpointEngineManager, CheckpointEngineMixin

NUM_CONTEXTS = NUM_ACTIONS = 8
NUM_SAMPLES = 64


class Member(CheckpointEngineMixin):
    """Who has a policy: to train it, or to sample it."""

    def __init__(self) -> None:
        self.model = torch.nn.Embedding(NUM_CONTEXTS, NUM_ACTIONS)  # logits of each action
        torch.nn.init.zeros_(self.model.weight)


def sample(policy: torch.nn.Module) -> torch.Tensor:
    """Contexts, and the actions that were sampled for them, [2, NUM_SAMPLES]."""
    contexts = torch.randint(NUM_CONTEXTS, (NUM_SAMPLES,))
    with torch.no_grad():
        actions = torch.distributions.Categorical(logits=policy(contexts)).sample()
    return torch.stack([contexts, actions])


def policy_loss(
    policy: torch.nn.Module, contexts: torch.Tensor, actions: torch.Tensor, rewards: torch.Tensor
) -> torch.Tensor:
    """REINFORCE (Williams 1992) with the mean reward as the baseline."""
    logprobs = torch.distributions.Categorical(logits=policy(contexts)).log_prob(actions)
    return -((rewards - rewards.mean()) * logprobs).mean()


def train(world_size: int, num_steps: int) -> None:
    """Send the weights, learn from what was sampled with them, and again."""
    trainer = Member()
    manager = CheckpointEngineManager(model=trainer, rank=0, world_size=world_size)
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=0.2)
    samples = torch.empty(world_size - 1, 2, NUM_SAMPLES, dtype=torch.int64)
    for step in range(1, num_steps + 1):
        report = manager.sync_weights(label=f"step-{step}")
        for sampler, received in enumerate(samples):
            dist.recv(received, src=sampler + 1)
        contexts, actions = samples.transpose(0, 1).flatten(1)
        rewards = (contexts == actions).float()
        optimizer.zero_grad()
        policy_loss(trainer.model, contexts, actions, rewards).backward()
        optimizer.step()
        print(
            f"{report.version}: reward {rewards.mean():.2f}, digest {report.digest[:12]} on "
            f"{len(report.replicas)} samplers"
        )
    manager.close()


def serve(rank: int, world_size: int, num_steps: int) -> None:
    """Take the weights, sample with them, and again."""
    sampler = Member()
    manager = CheckpointEngineManager(sampler=sampler, rank=rank, world_size=world_size)
    for _ in range(num_steps):
        manager.sync_weights()
        dist.send(sample(sampler.model), dst=0)
    manager.close()


def main() -> None:
    """Be the trainer or a sampler, as torchrun says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    num_steps = parser.parse_args().steps
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo")  # for the samples
    torch.manual_seed(rank)
    if rank == 0:
        train(world_size, num_steps)
    else:
        serve(rank, world_size, num_steps)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
