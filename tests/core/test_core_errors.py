from __future__ import annotations

import inspect
import re

import msgspec

from checkpoint_engine import errors
from checkpoint_engine.errors import CheckpointEngineError, PeerLost, RemoteError, UpdateFailed


def test_the_tree_is_the_one_that_is_drawn() -> None:
    drawn = dict(re.findall(r"^ +[│├└─ ]*(\w+)(?: \((\w+)\))?", errors.__doc__ or "", re.MULTILINE))
    found = {
        name: next((base.__name__ for base in kind.__bases__ if base.__module__ == "builtins"), "")
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, Exception)
    }
    del found["CheckpointEngineError"]
    assert {name: drawn.get(name) for name in found} == found
    assert all(issubclass(getattr(errors, name), CheckpointEngineError) for name in found)


def test_a_failure_travels_as_plain_text() -> None:
    try:
        raise PeerLost("replica 4711 died")
    except PeerLost as error:
        told = RemoteError.of(error, "rank 1, bucket 7")
    assert str(told) == "rank 1, bucket 7: PeerLost: replica 4711 died"
    assert "test_a_failure_travels_as_plain_text" in told.traceback
    assert msgspec.json.decode(msgspec.json.encode(told), type=RemoteError) == told
    assert str(RemoteError(type="KeyError", message="'a'")) == "KeyError: 'a'"


def test_a_failed_update_carries_its_report() -> None:
    assert UpdateFailed("no", {"outcome": "rolled_back"}).report == {"outcome": "rolled_back"}
