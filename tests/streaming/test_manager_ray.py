"""A manager in the driver of a Ray that is started for the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")


def test_actors_are_synced_and_one_may_die() -> None:
    script = Path(__file__).with_name("sync_ray.py")
    process = subprocess.run(
        [sys.executable, "-W", "default", str(script)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        check=True,
    )
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["published"] == "published"
    assert found["served"] == [["ray", "one", [1]]] * 2
    assert found["failed"].startswith("update to 'two' rolled back: sampler 1: PeerLost: it died")
    assert found["outcome"] == "rolled_back"
    assert found["kept"] == ["ray", "one", [1]]
    assert found["again"] == [["ray", "three", [4]]] * 2
    assert found["refused"].startswith("UsageError: a Sequential has no adapters")
    assert found["lost"].startswith("PeerLost: trainer 0 is gone")
