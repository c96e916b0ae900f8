"""Scripts beside this file that start a Ray of their own, and end it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def said_by(script: str) -> Any:
    """What it prints last, as JSON."""
    process = subprocess.run(
        [sys.executable, "-W", "default", str(Path(__file__).with_name(script))],
        stdout=subprocess.PIPE,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])
