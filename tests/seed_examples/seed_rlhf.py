"""The second example: a trainer's loop and a sampler, which meet by MASTER_ADDR and MASTER_PORT.

    python seed_rlhf.py trainer
    python seed_rlhf.py sampler

Between the marks stands the example's own text; models, and one import, are put in its place.
"""

from __future__ import annotations

import asyncio
import sys

from seed_models import TransformersModel, same, vLLMSampler

from checkpoint_engine import GlooCheckpointEngine as NCCLCheckpointEngine
from children import say

num_steps = sync_interval = 3

# fmt: off
# ruff: noqa: F841
# ── from here


# Trainer process
async def trainer_process():
    actor = TransformersModel(model_id='Qwen/Qwen2.5-7B-Instruct')
    engine = NCCLCheckpointEngine()
    engine.is_master = True
    engine.prepare()
    engine.init_process_group(rank=0, world_size=2)

    for step in range(num_steps):
        # Train one step
        loss = actor.forward_backward(...)
        actor.clip_grad_and_step()

        # Periodically sync weights to sampler
        if step % sync_interval == 0:
            await engine.send_weights(
                actor.model.named_parameters()
            )

    engine.finalize()


# Sampler process
async def sampler_process():
    sampler = vLLMSampler(model_id='Qwen/Qwen2.5-7B-Instruct')
    engine = NCCLCheckpointEngine()
    engine.prepare()
    engine.init_process_group(rank=1, world_size=2)

    # Receive and load new weights
    async for name, tensor in engine.receive_weights():
        sampler.engine.update_weight(name, tensor)

    engine.finalize()
    # ── to here
    trained = TransformersModel("")
    trained.clip_grad_and_step()
    say(same=same(sampler.model, trained.model))


# Run
if sys.argv[1] == "trainer":
    asyncio.run(trainer_process())
else:
    asyncio.run(sampler_process())
