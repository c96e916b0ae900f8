"""A rank's door: real sockets, real sessions, and decisions that come when they come."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from toy_adapter import EPOCH, ToyAdapter

from checkpoint_engine.errors import PeerLost, UpdateRefused
from checkpoint_engine.manifest import Version
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Store
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.handover import Attachments, Part
from checkpoint_engine.update.protocol import (
    PROTOCOL,
    Applied,
    Confirmed,
    Deadlines,
    Decision,
    Event,
    FromRank,
    Hello,
    Joined,
    Left,
    Offer,
    Ready,
    Stop,
    Voted,
    Withdrawn,
)
from checkpoint_engine.update.session import Outcome, run
from checkpoint_engine.update.sessions import Door, Sessions

WAIT_SECONDS = 30.0
OLD = bytes(range(64))
NEW = torch.arange(64, 128, dtype=torch.uint8)


class Rank:
    """A door with one version behind it, whose decisions the test makes."""

    def __init__(self, deadlines: Deadlines) -> None:
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.store = Store()
        self.shard = self.store.register("new", TensorSource({"w": NEW}))
        self.door = Door(self.store.segment)
        part = Part(
            address=self.door.address,
            segment=self.shard.segment.name,
            start=0,
            offset=0,
            length=self.shard.manifest.num_bytes,
        )
        self.offer = Offer(
            update="update",
            epoch=EPOCH,
            version=Version(label="new", digest=self.shard.manifest.digest),
            manifest=self.shard.manifest.to_msgpack(),
            parts=(part,),
            deadlines=deadlines,
        )
        self.sessions = Sessions(3, self.offer, self.events.put)
        self.door.attend(self.sessions)

    def next(self, kind: type[Any]) -> Any:
        """The next event, which must be of this kind."""
        event = self.events.get(timeout=WAIT_SECONDS)
        assert isinstance(event, kind), event
        return event

    def next_vote(self, kind: type[Any]) -> Any:
        vote = self.next(Voted).vote
        assert isinstance(vote, kind), vote
        return vote

    def decide(self, step: str, *proceed: str, quarantine: tuple[str, ...] = ()) -> None:
        self.sessions.decide(Decision(step=step, proceed=proceed, quarantine=quarantine))

    def close(self) -> None:
        self.sessions.close()
        self.door.close()
        self.store.close()


class Worker:
    """A toy engine that takes an update from a rank on a thread of its own."""

    def __init__(self, rank: Rank, *failing: str) -> None:
        self.adapter = ToyAdapter(weights=OLD, label="old", failing=set(failing))
        self._address = rank.door.address
        self._ended: list[Outcome | Exception] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def outcome(self) -> Outcome:
        """How its session ended; waits for that."""
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive(), "the session does not end"
        (ended,) = self._ended
        if isinstance(ended, Exception):
            raise ended
        return ended

    def _run(self) -> None:
        attachments = Attachments(keep_maps=False)
        try:
            self._ended.append(run(self._address, self.adapter, attachments))
        except Exception as error:
            self._ended.append(error)


@pytest.fixture
def make_rank() -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def make(ready_seconds: float = 20.0, pause_seconds: float = 20.0) -> Rank:
        deadlines = Deadlines(
            ready_seconds=ready_seconds,
            pause_seconds=pause_seconds,
            return_seconds=pause_seconds + 30.0,
        )
        ranks.append(Rank(deadlines))
        return ranks[-1]

    yield make
    for rank in ranks:
        rank.close()


@pytest.fixture
def rank(make_rank: Callable[..., Rank]) -> Rank:
    return make_rank()


def test_votes_go_up_and_decisions_come_down(rank: Rank) -> None:
    worker = Worker(rank)
    joined = rank.next(Joined)
    assert (joined.rank, joined.follower) == (3, False)
    assert (joined.hello.replica, joined.hello.base) == ("toy", "old")
    assert rank.next_vote(Ready).way_back == "snapshot"
    rank.decide("apply", joined.session)
    rank.next_vote(Applied)
    rank.decide("publish", joined.session)
    rank.next_vote(Confirmed)
    assert worker.outcome == Outcome("published", "new")
    assert (worker.adapter.weights, worker.adapter.label) == (bytes(NEW.numpy()), "new")


def test_every_session_has_a_name_of_its_own(rank: Rank) -> None:
    workers = [Worker(rank), Worker(rank)]
    events = [rank.events.get(timeout=WAIT_SECONDS) for _ in range(4)]
    names = [event.session for event in events if isinstance(event, Joined)]
    assert len(set(names)) == 2
    rank.sessions.close()
    assert {worker.outcome.state for worker in workers} == {"kept"}


@pytest.mark.parametrize("applied", [False, True])
def test_a_stop_reaches_every_session(applied: bool, rank: Rank) -> None:
    worker = Worker(rank)
    name = rank.next(Joined).session
    rank.next_vote(Ready)
    if applied:
        rank.decide("apply", name)
        rank.next_vote(Applied)
    rank.decide("stop")
    assert not rank.next_vote(Withdrawn).torn
    assert worker.outcome.state == "kept"
    assert worker.adapter.weights == OLD


def test_who_says_no_is_heard_and_told_at_last_whether_it_is_quarantined(
    make_rank: Callable[..., Rank],
) -> None:
    """The others may take longer to get ready than any pause may last."""
    rank = make_rank(ready_seconds=20.0, pause_seconds=0.2)
    worker = Worker(rank, "prepare")
    name = rank.next(Joined).session
    rank.next_vote(Withdrawn)
    time.sleep(1.0)
    rank.decide("apply", "others", quarantine=(name,))
    assert worker.outcome.state == "kept"
    assert worker.adapter.quarantined is not None


def test_the_sibling_of_who_said_no_is_quarantined(rank: Rank) -> None:
    worker = Worker(rank)
    name = rank.next(Joined).session
    rank.next_vote(Ready)
    rank.decide("apply", "others", quarantine=(name,))
    rank.next_vote(Withdrawn)
    assert worker.outcome.state == "kept"
    assert worker.adapter.quarantined is not None


def test_a_session_that_is_in_doubt_when_its_rank_closes_returns_to_its_base(rank: Rank) -> None:
    worker = Worker(rank)
    name = rank.next(Joined).session
    rank.next_vote(Ready)
    rank.decide("apply", name)
    rank.next_vote(Applied)
    rank.sessions.close()
    assert worker.outcome.state == "kept"
    assert (worker.adapter.weights, worker.adapter.undecided) == (OLD, "update")


# Who comes at the wrong time


def test_a_stop_while_a_session_is_being_offered_comes_after_the_offer(rank: Rank) -> None:
    """A session that is told to stop before it was offered anything would look lost."""
    posted, stopped = threading.Event(), threading.Event()

    def post(event: Event) -> None:
        rank.events.put(event)
        if isinstance(event, Joined):
            posted.set()
            assert stopped.wait(WAIT_SECONDS)

    rank.sessions = Sessions(3, rank.offer, post)
    rank.door.attend(rank.sessions)
    worker = Worker(rank)
    assert posted.wait(WAIT_SECONDS)
    rank.decide("stop")
    stopped.set()
    rank.next(Joined)
    rank.next_vote(Ready)
    rank.next_vote(Withdrawn)
    assert worker.outcome.state == "kept"


def test_a_hello_to_an_update_that_has_just_ended_is_told_so(rank: Rank) -> None:
    """The door has let it in, and nobody would decide for it."""
    rank.sessions.close()
    with pytest.raises(UpdateRefused, match="no update is under way"):
        _ = Worker(rank).outcome
    assert rank.events.empty()


def test_a_hello_to_no_update_is_told_so(rank: Rank) -> None:
    rank.door.attend(None)
    with pytest.raises(UpdateRefused, match="no update is under way"):
        _ = Worker(rank).outcome
    assert rank.events.empty()


def test_a_draft_model_follows_what_was_decided(rank: Rank) -> None:
    target = Worker(rank)
    name = rank.next(Joined).session
    rank.next_vote(Ready)
    rank.decide("apply", name)
    rank.next_vote(Applied)
    draft = Worker(rank)
    assert rank.next(Joined).follower
    rank.decide("publish", name)
    assert target.outcome.state == "published"
    assert draft.outcome.state == "published"
    said = [type(rank.next(Voted).vote) for _ in range(4)]
    assert sorted(kind.__name__ for kind in said) == ["Applied", "Confirmed", "Confirmed", "Ready"]


def test_a_follower_of_an_update_that_is_stopped_is_refused(rank: Rank) -> None:
    rank.decide("apply")
    draft = Worker(rank)
    assert rank.next(Joined).follower
    rank.decide("stop")
    with pytest.raises(UpdateRefused, match="not published"):
        _ = draft.outcome
    assert draft.adapter.weights == OLD


@pytest.mark.parametrize("failing", ["prepare", "apply"])
def test_a_follower_that_fails_keeps_its_base(failing: str, rank: Rank) -> None:
    rank.decide("apply")
    draft = Worker(rank, failing)
    assert rank.next(Joined).follower
    rank.decide("publish")
    assert draft.outcome.state == "kept"
    assert draft.adapter.weights == OLD
    if failing == "apply":
        rank.next_vote(Ready)
    assert not rank.next_vote(Withdrawn).torn


# Who breaks the protocol


def greet(rank: Rank) -> Channel[FromRank]:
    """A connection that has said hello and heard the offer."""
    channel: Channel[FromRank] = Channel(sockets.connect(rank.door.address, 5), FromRank)
    channel.send(
        Hello(protocol=PROTOCOL, replica="odd", engine="odd", rank=0, world_size=1, base=None)
    )
    assert isinstance(channel.receive(WAIT_SECONDS), Offer)
    rank.next(Joined)
    return channel


def test_a_session_that_vanishes_has_left(rank: Rank) -> None:
    greet(rank).close()
    left = rank.next(Left)
    assert (left.error.type, left.error.where) == ("PeerLost", "odd")


def test_a_second_hello_ends_the_session(rank: Rank) -> None:
    channel = greet(rank)
    channel.send(
        Hello(protocol=PROTOCOL, replica="odd", engine="odd", rank=0, world_size=1, base=None)
    )
    assert rank.next(Left).error.type == "ProtocolError"
    with pytest.raises(PeerLost):
        channel.receive(WAIT_SECONDS)
    channel.close()


def test_a_message_of_another_update_ends_the_session(rank: Rank) -> None:
    channel = greet(rank)
    channel.bind("another", EPOCH)
    channel.send(Ready(way_back="none"))
    assert rank.next(Left).error.type == "ProtocolError"
    channel.close()


def test_a_first_message_that_is_no_greeting_is_turned_away(rank: Rank) -> None:
    channel: Channel[FromRank] = Channel(sockets.connect(rank.door.address, 5), FromRank)
    channel.send(Ready(way_back="none"))
    assert isinstance(channel.receive(WAIT_SECONDS), Stop)
    with pytest.raises(PeerLost):
        channel.receive(WAIT_SECONDS)
    assert rank.events.empty(), "it has joined nothing"
    channel.close()


def test_one_session_that_is_gone_does_not_keep_a_decision_from_the_others(rank: Rank) -> None:
    gone = greet(rank)
    worker = Worker(rank)
    name = rank.next(Joined).session
    rank.next_vote(Ready)
    gone.close()
    rank.next(Left)
    rank.decide("apply", "3.0", name)
    rank.next_vote(Applied)
    rank.decide("publish", name)
    rank.next_vote(Confirmed)
    assert worker.outcome.state == "published"


def test_the_offer_to_a_follower_says_that_it_is_one(rank: Rank) -> None:
    rank.decide("publish")
    channel: Channel[FromRank] = Channel(sockets.connect(rank.door.address, 5), FromRank)
    channel.send(Hello(protocol=PROTOCOL, replica="d", engine="d", rank=0, world_size=1, base=None))
    offer = channel.receive(WAIT_SECONDS)
    assert offer == msgspec.structs.replace(rank.offer, follower=True)
    channel.close()
    assert rank.next(Joined).follower
    rank.next(Left)
