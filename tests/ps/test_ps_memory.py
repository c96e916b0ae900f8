"""Store memory: used again when it may be, given back when nobody needs it."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from ps_tools import EngineProcess, digests, register, version
from safetensors.torch import save_file

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import wait_until

Engines = tuple[EngineProcess, EngineProcess]


def num_maps(pid: int) -> int:
    """How many pieces of store memory a process maps."""
    return Path(f"/proc/{pid}/maps").read_text().count("memfd:ckpt-engine")


def num_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def update(server: ParameterServer, engine: EngineProcess, seed: int, *, pooled: bool) -> None:
    register(server, f"step-{seed}", seed, use_shared_memory_pool=pooled)
    server.update(f"step-{seed}", engine.request())


def test_memory_is_given_back_when_the_replica_has_moved_on(
    server: ParameterServer, engines: Engines
) -> None:
    engine = engines[0]
    here, there = num_maps(os.getpid()), num_maps(engine.pid)
    update(server, engine, 1, pooled=False)
    assert num_maps(engine.pid) == there + 1
    server.unregister_checkpoint("step-1")
    assert num_maps(os.getpid()) == here + 1, "the engine still needs it as its way back"
    for seed in (2, 3, 4):
        update(server, engine, seed, pooled=False)
        server.unregister_checkpoint(f"step-{seed}")
    wait_until(lambda: num_maps(os.getpid()) == here + 2, "steps 1 and 2 given back")
    assert num_maps(engine.pid) == there + 2, "what it serves, and the version before"
    engine.call("reset")
    wait_until(lambda: num_maps(os.getpid()) == here, "steps 3 and 4 given back")
    assert num_maps(engine.pid) == there


def test_memory_is_given_back_when_the_replica_dies(
    server: ParameterServer, engines: Engines
) -> None:
    here = num_maps(os.getpid())
    update(server, engines[0], 1, pooled=False)
    server.unregister_checkpoint("step-1")
    assert num_maps(os.getpid()) == here + 1
    engines[0].kill()
    wait_until(lambda: num_maps(os.getpid()) == here, "step-1 given back")


def test_memory_is_given_back_after_an_update_that_failed(
    server: ParameterServer, engines: Engines
) -> None:
    good, bad = engines
    here, there = num_maps(os.getpid()), num_maps(good.pid)
    register(server, "step-1", 1)
    server.update("step-1", [good.request(), bad.request()])
    register(server, "step-2", 2)
    with pytest.raises(UpdateFailed):
        server.update("step-2", [good.request(), bad.request(behaviour="raise")])
    server.unregister_checkpoint("step-2")
    wait_until(lambda: num_maps(os.getpid()) == here + 1, "step-2 given back")
    wait_until(lambda: num_maps(good.pid) == there + 1, "step-2 let go")


def test_a_server_that_is_closed_gives_everything_back(engines: Engines) -> None:
    here = num_maps(os.getpid())
    descriptors = num_descriptors(os.getpid())
    server = ParameterServer()
    update(server, engines[0], 1, pooled=True)
    update(server, engines[0], 2, pooled=False)
    server.close()
    wait_until(lambda: num_maps(os.getpid()) == here, "memory given back")
    wait_until(lambda: num_descriptors(os.getpid()) <= descriptors, "descriptors closed")
    assert engines[0].weights == digests(version(2))


def test_pooled_memory_is_used_again_and_never_under_a_replica(
    server: ParameterServer, engines: Engines
) -> None:
    """Versions come and go while a replica keeps its base, to which it can always return."""
    good, bad = engines
    here = num_maps(os.getpid())
    for seed in range(0, 40, 4):
        register(server, f"step-{seed}", seed, use_shared_memory_pool=True)
        server.update(f"step-{seed}", [good.request(), bad.request()])
        for later in (seed + 1, seed + 2, seed + 3):
            register(server, f"step-{later}", later, use_shared_memory_pool=True)
        with pytest.raises(UpdateFailed):
            server.update(f"step-{later}", [good.request(), bad.request(behaviour="raise")])
        assert [engine.weights for engine in engines] == [digests(version(seed))] * 2
        wait_until(lambda: num_maps(os.getpid()) <= here + 4, "segments used again")


@pytest.mark.parametrize("pooled", [False, True])
def test_files_in_memory_become_the_stores(
    server: ParameterServer, engines: Engines, pooled: bool
) -> None:
    engine = engines[0]
    with TemporaryDirectory(prefix="ckpt-engine-test-", dir="/dev/shm") as folder:
        for seed in (1, 2, 3):
            file = Path(folder, "model.safetensors")
            save_file(version(seed), file)
            server.register_checkpoint(
                f"step-{seed}",
                files=[file],
                use_inplace_pin_memory=True,
                use_shared_memory_pool=pooled,
            )
            assert os.listdir(folder) == []
            server.gather_metas(f"step-{seed}")
            server.update(f"step-{seed}", engine.request())
            assert engine.weights == digests(version(seed))


def test_many_updates_leave_nothing_behind(server: ParameterServer, engines: Engines) -> None:
    engine = engines[0]

    def left() -> tuple[int, ...]:
        processes = (os.getpid(), engine.pid)
        counts = [count(pid) for count in (num_maps, num_descriptors) for pid in processes]
        num_threads = sum(thread.name.startswith("ckpt") for thread in threading.enumerate())
        return (*counts, num_threads, len(os.listdir(os.environ["CKPT_ENGINE_SOCKET_DIR"])))

    for seed in range(4):
        update(server, engine, seed, pooled=True)
    before = left()
    for seed in range(4, 16):
        update(server, engine, seed, pooled=True)
    wait_until(lambda: all(now <= then for now, then in zip(left(), before, strict=True)))


def test_many_updates_leave_no_keys_behind(server: ParameterServer, engines: Engines) -> None:
    """Else rank 0 keeps the manifest of every version that ever was."""
    num_keys = []
    for seed in range(10):
        update(server, engines[0], seed, pooled=True)
        server.store_based_barrier()
        num_keys.append(len(server._rendezvous.store))
    assert num_keys[-1] == num_keys[4]
