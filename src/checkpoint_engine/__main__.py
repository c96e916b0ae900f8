"""`python -m checkpoint_engine`, for child processes and environments without the script."""

from __future__ import annotations

from checkpoint_engine.cli import main

if __name__ == "__main__":
    main()
