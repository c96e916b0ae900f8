"""A manager in the driver of a Ray that is started for the test."""

from __future__ import annotations

from ray_scripts import said_by


def test_actors_are_synced_and_one_may_die() -> None:
    found = said_by("sync_ray.py")
    assert found["published"] == "published"
    assert found["served"] == [["ray", "one", [1]]] * 2
    assert found["failed"].startswith("update to 'two' rolled back: sampler 1: PeerLost: it died")
    assert found["outcome"] == "rolled_back"
    assert found["kept"] == ["ray", "one", [1]]
    assert found["again"] == [["ray", "three", [4]]] * 2
    assert found["refused"].startswith("UsageError: a Sequential has no adapters")
    assert found["lost"].startswith("PeerLost: trainer 0 is gone")
