"""Actors of a Ray that is started for the test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from stream_weights import weights

from checkpoint_engine.errors import UsageError
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import digest_in_place
from checkpoint_engine.streaming import RayCheckpointEngine

pytest.importorskip("ray")


def test_actors_meet_stream_and_notice_who_dies() -> None:
    script = Path(__file__).with_name("stream_ray.py")
    process = subprocess.run(
        [sys.executable, "-W", "default", str(script)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
        check=True,
    )
    found = json.loads(process.stdout.splitlines()[-1])
    assert found["digests"] == [digest_in_place(TensorSource(weights(1))).digest] * 3
    at_trainer, at_sampler = found["lost"]
    assert at_trainer.startswith("PeerLost: rank 2 died")
    assert at_sampler.startswith("PeerLost: the sender gave up: rank 2 died")


def test_it_lives_within_ray() -> None:
    with pytest.raises(UsageError, match=r"after ray\.init\(\)"):
        RayCheckpointEngine()
