"""The command line, `ckpt-engine`."""

from __future__ import annotations

from checkpoint_engine.cli.app import main

__all__ = ["main"]
