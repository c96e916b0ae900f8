"""The first example: rank 0 sends, ranks 1-4 receive; told which on the command line.

    python seed_basic.py train
    python seed_basic.py infer RANK METADATA

Between the marks stands the example's own text; a model, and one import, are put in its place.
"""

from __future__ import annotations

import asyncio
import json
import sys

from seed_models import make_model, same

from checkpoint_engine import GlooCheckpointEngine as NCCLCheckpointEngine
from children import say

# fmt: off


async def train() -> None:
    model = make_model(seed=1)
    # ── In training process (rank 0)
    engine = NCCLCheckpointEngine(bucket_size=512<<20)  # 512MB bucket
    engine.is_master = True
    engine.prepare()
    say(metadata=engine.prepare())  # which the other processes are told
    engine.init_process_group(rank=0, world_size=5)

    # Send weights
    await engine.send_weights(model.named_parameters())
    engine.finalize()
    # ──


async def infer(rank: int, metadata: dict[str, object]) -> None:
    model = make_model(seed=2)
    assert not same(model, make_model(seed=1))
    # ── In inference process (rank 1-4)
    engine = NCCLCheckpointEngine(bucket_size=512<<20)
    engine.prepare()
    engine.init_process_group(rank=rank, world_size=5, master_metadata=metadata)

    # Receive weights
    async for name, tensor in engine.receive_weights():
        model.load_state_dict({name: tensor}, strict=False)
    engine.finalize()
    # ──
    say(same=same(model, make_model(seed=1)))


if sys.argv[1] == "train":
    asyncio.run(train())
else:
    asyncio.run(infer(int(sys.argv[2]), json.loads(sys.argv[3])))
