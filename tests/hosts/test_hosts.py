"""Ranks on several hosts, under torchrun; hosts are lost, and their links."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from network import Host, Network

from children import Child, call_all, spawn, wait_until

LAUNCHER_PORT = 29500
SECRET = "of all ranks of these tests"
TENSOR_BYTES = 4_000_001  # of what `register_large` makes

Start = Callable[..., list[Child]]


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    try:
        network = Network(num_hosts=4)
    except OSError as error:
        pytest.skip(f"SEVERAL HOSTS ARE NOT TESTED: no network namespaces here: {error}")
    with network:
        yield network


@pytest.fixture
def folder() -> Iterator[Path]:
    """Short, since sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="ckpt-") as folder:
        yield Path(folder)


@pytest.fixture
def start(network: Network, folder: Path) -> Iterator[Start]:
    """Starts one rank on each of some hosts under torchrun, or on one without."""
    started: list[Child] = []

    def on(*hosts: Host, launched: bool = True) -> list[Child]:
        ranks = [
            Child(
                "ps/ps_rank.py",
                start=partial(
                    spawn,
                    inside=host.inside,
                    options=_torchrun(number, hosts) if launched else (),
                ),
                CKPT_ENGINE_SOCKET_DIR=str(folder / host.name[-1]),
                CKPT_ENGINE_STATE_DIR=str(folder / f"state-{host.name[-1]}"),
                CKPT_ENGINE_HOST=host.name,
                CKPT_ENGINE_SECRET=SECRET,
                CKPT_ENGINE_ADDRESS="" if launched else host.address,
            )
            for number, host in enumerate(hosts)
        ]
        started.extend(ranks)
        assert call_all(ranks, "meet") == [[n, len(hosts)] for n in range(len(hosts))]
        return ranks

    yield on
    for host in network.hosts:
        host.kill()
    for rank in started:
        rank.close()
    for host in network.hosts:
        host.up()


def _torchrun(number: int, hosts: tuple[Host, ...]) -> list[str]:
    return [
        "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", f"--node-rank={number}",
        "--nproc-per-node=1", f"--master-addr={hosts[0].address}",
        f"--master-port={LAUNCHER_PORT}",
    ]  # fmt: skip


def register(ranks: list[Child], name: str, num_tensors: int) -> dict[str, str]:
    """Every rank has its share; returns the digests of the whole."""
    numbers = [
        rank.send(
            "register_large", name=name, seed=num_tensors, num_tensors=num_tensors,
            share=(number, len(ranks)),
        )
        for number, rank in enumerate(ranks)
    ]  # fmt: skip
    wholes = [rank.result(number) for rank, number in zip(ranks, numbers, strict=True)]
    assert all(whole == wholes[0] for whole in wholes)
    whole: dict[str, str] = wholes[0]
    return whole


def bring(ranks: list[Child], name: str, num_tensors: int) -> dict[str, str]:
    """An update that succeeds; returns what is served now."""
    whole = register(ranks, name, num_tensors)
    outcomes = call_all(ranks, "update", name=name)
    assert [one["outcome"] for one in outcomes] == ["published"] * len(ranks), outcomes
    assert call_all(ranks, "weights") == [whole] * len(ranks)
    return whole


def begin_update(
    ranks: list[Child], name: str, hosts: list[Host], timeout: float = 30.0
) -> list[int]:
    """Begin an update, and return once bytes travel."""

    def num_bytes() -> int:
        return sum(host.num_bytes_received for host in hosts)

    before = num_bytes()
    numbers = [rank.send("update", name=name, timeout=timeout) for rank in ranks]
    wait_until(lambda: num_bytes() > before + TENSOR_BYTES, "the middle of the update")
    return numbers


def test_two_hosts_one_that_joins_and_a_link_that_is_lost_and_comes_back(
    network: Network, start: Start
) -> None:
    near, far, new, _ = network.hosts
    ranks = start(near, far)
    served = bring(ranks, "v1", num_tensors=4)
    for host in (near, far):
        addresses = {address for address, port in host.listening if port != LAUNCHER_PORT}
        assert addresses == {host.address}, "never all of them"

    (reader,) = start(new, launched=False)
    assert reader.call("join", metas=ranks[0].call("metas"))["outcome"] == "published"
    assert reader.call("weights") == served

    register(ranks, "lost", num_tensors=24)
    numbers = begin_update(ranks, "lost", [near, far], timeout=8.0)
    far.down()
    assert ranks[0].result(numbers[0])["outcome"] == "aborted"
    with pytest.raises(RuntimeError, match=r"PeerLost|DeadlineExceeded"):
        ranks[1].result(numbers[1])
    assert call_all(ranks, "weights") == [served] * 2
    far.up()
    bring(ranks, "v2", num_tensors=5)


def test_four_hosts_of_which_one_is_lost_in_the_middle_of_an_update(
    network: Network, start: Start
) -> None:
    ranks = start(*network.hosts)
    served = bring(ranks, "v1", num_tensors=8)
    register(ranks, "lost", num_tensors=24)
    numbers = begin_update(ranks, "lost", network.hosts, timeout=12.0)
    network.hosts[3].kill()
    outcomes = [rank.result(n) for rank, n in zip(ranks[:3], numbers[:3], strict=True)]
    assert [one["outcome"] for one in outcomes] == ["aborted"] * 3
    assert call_all(ranks[:3], "weights") == [served] * 3
