"""A session beside an engine is not bound to the cores on which the engine computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BOUND = """
import json, os, threading
from checkpoint_engine.update.background import _leave_bound_cores

os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
seen = []

def session():
    _leave_bound_cores()
    helper = threading.Thread(target=lambda: seen.append(sorted(os.sched_getaffinity(0))))
    helper.start()
    helper.join()

thread = threading.Thread(target=session)
thread.start()
thread.join()
print(json.dumps([*seen, sorted(os.sched_getaffinity(0))]))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core is all there is")
def test_its_threads_may_use_what_the_engines_parent_may() -> None:
    cores = sorted(os.sched_getaffinity(0))
    found = subprocess.run(
        [sys.executable, "-c", BOUND], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(found.stdout) == [cores, cores[:1]], "the engine's own thread stays bound"
