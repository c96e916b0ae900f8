"""A trainer in a process of its own: two updates in a row from tensors, "step-1" and "step-2"."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file

from checkpoint_engine import ParameterServer, engine_requests


def main(checkpoint: str, *endpoints: str) -> None:
    tensors = load_file(checkpoint)
    server = ParameterServer(rank=0, world_size=1)
    requests = engine_requests(endpoints, rank=0, world_size=1)
    for step in ("step-1", "step-2"):
        tensors = {name: tensor + torch.ones_like(tensor) for name, tensor in tensors.items()}
        server.register_checkpoint(step, named_tensors=tensors, use_shared_memory_pool=True)
        server.gather_metas(step)
        server.load_metas(server.get_metas())
        print(server.update(step, requests).digest)
    server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
