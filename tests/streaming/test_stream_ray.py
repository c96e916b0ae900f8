"""Actors of a Ray that is started for the test."""

from __future__ import annotations

import pytest
from ray_scripts import said_by
from stream_weights import weights

from checkpoint_engine.errors import UsageError
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import digest_in_place
from checkpoint_engine.streaming import RayCheckpointEngine


def test_actors_meet_stream_and_notice_who_dies() -> None:
    found = said_by("stream_ray.py")
    assert found["digests"] == [digest_in_place(TensorSource(weights(1))).digest] * 3
    at_trainer, at_sampler = found["lost"]
    assert at_trainer.startswith("PeerLost: rank 2 died")
    assert at_sampler.startswith("PeerLost: the sender gave up: rank 2 died")
    assert found["elsewhere"].startswith("UsageError: master_metadata has no 'secret': pass what")


def test_it_lives_within_ray() -> None:
    with pytest.raises(UsageError, match=r"after ray\.init\(\)"):
        RayCheckpointEngine()
