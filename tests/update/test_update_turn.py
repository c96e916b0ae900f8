"""A session borrows the engine's thread when it is lent, and for as long as it lives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from checkpoint_engine.adapters.turn import Turn
from checkpoint_engine.errors import DeadlineExceeded

LONG = 60.0


@pytest.fixture
def beside() -> Iterator[Callable[..., Future[object]]]:
    """Runs a session on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit


def test_what_a_session_asks_for_runs_on_the_engines_thread(
    beside: Callable[..., Future[object]],
) -> None:
    turn = Turn()

    def session() -> list[int]:
        turn.take(LONG)
        threads = [turn.do(threading.get_ident) for _ in range(2)]
        turn.end()
        return threads

    running = beside(session)
    turn.lend()
    assert running.result(LONG) == [threading.get_ident()] * 2
    assert turn.is_wanted


def test_an_error_goes_to_the_session_and_leaves_the_engine_alone(
    beside: Callable[..., Future[object]],
) -> None:
    turn = Turn()

    def session() -> None:
        turn.take(LONG)
        try:
            turn.do(lambda: 1 // 0)
        finally:
            turn.end()

    running = beside(session)
    turn.lend()
    with pytest.raises(ZeroDivisionError):
        running.result(LONG)


def test_a_session_that_is_not_lent_the_thread_gives_up() -> None:
    with pytest.raises(DeadlineExceeded, match="was not told"):
        Turn().take(0.01)


def test_an_ended_session_keeps_nobody_however_often_it_is_lent_to() -> None:
    turn = Turn()
    turn.end()
    turn.lend()
    turn.lend()


def test_the_engines_own_end_ends_what_was_asked_for(
    beside: Callable[..., Future[object]],
) -> None:
    turn = Turn()

    def leave() -> None:
        raise SystemExit

    def session() -> None:
        turn.take(LONG)
        turn.do(leave)

    running = beside(session)
    with pytest.raises(SystemExit):
        turn.lend()
    with pytest.raises(SystemExit):
        running.result(LONG)
