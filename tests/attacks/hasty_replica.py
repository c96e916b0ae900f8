"""`ckpt-engine` with short deadlines for HTTP clients, so that tests of slow ones are quick."""

from __future__ import annotations

from checkpoint_engine.cli import main
from checkpoint_engine.replica import server

if __name__ == "__main__":
    server.HEAD_TIMEOUT_SECONDS = server.BODY_TIMEOUT_SECONDS = 2.0
    main()
