"""The command, and before it what a replica imports of itself: so a nursery imports that once."""

import transformers.models.qwen3.modeling_qwen3  # noqa: F401

import checkpoint_engine.replica.replica
import checkpoint_engine.replica.server  # noqa: F401
from checkpoint_engine.cli import main

if __name__ == "__main__":
    main()
