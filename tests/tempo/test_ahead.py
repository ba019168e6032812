"""Iterations sampled ahead of the one that trains: how many, in which order, from which data; and how it all ends."""

import copy
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_em.ahead import Ahead
from tempo_em.waiting import Sampled
from tempo_engine import parallel
from tempo_engine.cursor import Cursor
from tempo_engine.errors import Halted
from tempo_engine.rollout import Prompt, Rollout

Cursors = dict[str, Cursor[Any]]
PROMPTS = [Prompt(str(i), "", (5, 6)) for i in range(7)]


def cursors_at(position: int) -> Cursors:
    cursor = Cursor(PROMPTS, seed="0/unlabelled")
    cursor.position = position
    return {"unlabelled": cursor}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.001)


class Source:
    """Samples prompts from the cursors it is given. `begun` and `done` are iterations; those in `gates` wait to be let through."""

    def __init__(self, *, wants: Callable[[int], int] = lambda iteration: 2) -> None:
        self.wants = wants
        self.begun: list[int] = []
        self.done: list[int] = []
        self.gates: dict[int, threading.Event] = {}
        self.failures: dict[int, Exception] = {}
        self.was_alone: list[bool] = []

    def __call__(self, iteration: int, cursors: Cursors) -> Sampled:
        self.begun.append(iteration)
        self.was_alone.append(parallel._is_alone.get())
        if iteration in self.gates:
            self.gates[iteration].wait()
        if iteration in self.failures:
            raise self.failures.pop(iteration)
        prompts = cursors["unlabelled"].next(self.wants(iteration))
        rollouts = [Rollout(prompt, [iteration], [-1.0], ((0, 1),), True, "") for prompt in prompts]
        self.done.append(iteration)
        positions = {"unlabelled": cursors["unlabelled"].position}
        return Sampled([], [], None, rollouts, len(rollouts), len(rollouts), positions)


@pytest.fixture
def make_ahead() -> Iterator[Callable[[int], Ahead]]:
    made: list[Ahead] = []

    def make(depth: int) -> Ahead:
        made.append(Ahead(depth))
        return made[-1]

    yield make
    for ahead in made:
        ahead.close()


def train(
    ahead: Ahead, source: Source, iterations: range, cursors: Cursors, *, stage: str = "em", last: int | None = None
) -> list[Sampled]:
    """Take one iteration after the other as the loop does, moving its own cursors along."""
    taken = []
    for iteration in iterations:
        sampled = ahead.take(stage, iteration, iterations[-1] if last is None else last, cursors, source)
        cursors["unlabelled"].position = sampled.cursors["unlabelled"]
        taken.append(sampled)
    return taken


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_so_many_iterations_are_begun_ahead_and_no_more(make_ahead: Callable[[int], Ahead], depth: int) -> None:
    ahead, source, cursors = make_ahead(depth), Source(), cursors_at(0)
    for iteration in range(4):
        train(ahead, source, range(iteration, iteration + 1), cursors, last=99)
        until(lambda: len(source.done) == iteration + 1 + depth)  # noqa: B023
        assert source.begun == list(range(iteration + 1 + depth)), "in order, each once, and none after these"


def test_while_one_trains_the_next_is_sampled(make_ahead: Callable[[int], Ahead]) -> None:
    """The sampling of iteration 1 is held up: iteration 0 can be had all the same, and 1 has begun without being asked for."""
    ahead, source = make_ahead(1), Source()
    source.gates[1] = threading.Event()
    (sampled,) = train(ahead, source, range(1), cursors_at(0), last=9)
    assert [r.response_ids for r in sampled.unlabelled] == [[0], [0]]
    until(lambda: source.begun == [0, 1])
    source.gates[1].set()


def test_one_is_sampled_at_a_time(make_ahead: Callable[[int], Ahead]) -> None:
    ahead, source = make_ahead(3), Source()
    source.gates[1] = threading.Event()
    train(ahead, source, range(1), cursors_at(0), last=9)
    until(lambda: source.begun == [0, 1])
    assert source.done == [0]
    source.gates[1].set()
    until(lambda: source.done == [0, 1, 2, 3])


def test_nothing_is_begun_beyond_the_last_iteration_of_a_stage(make_ahead: Callable[[int], Ahead]) -> None:
    ahead, source = make_ahead(3), Source()
    train(ahead, source, range(5), cursors_at(0))
    ahead.close()
    assert source.begun == [0, 1, 2, 3, 4]


@settings(deadline=None, max_examples=30)
@given(depth=st.integers(1, 4), wants=st.lists(st.integers(0, 9), min_size=1, max_size=8), start=st.integers(0, 30))
def test_prompts_and_cursors_are_those_of_sampling_each_in_its_turn(depth: int, wants: list[int], start: int) -> None:
    """However many prompts an iteration takes (dynamic sampling takes more), ahead or not."""
    source, ahead = Source(wants=wants.__getitem__), Ahead(depth)
    turn, mine = cursors_at(start), cursors_at(start)
    in_turn = [source(iteration, turn) for iteration in range(len(wants))]
    try:
        assert train(ahead, source, range(len(wants)), mine) == in_turn
    finally:
        ahead.close()
    assert mine["unlabelled"].position == start + sum(wants)


def test_the_loops_own_cursors_stay_where_they_are(make_ahead: Callable[[int], Ahead]) -> None:
    """A checkpoint holds the position before what has not trained yet."""
    ahead, source, cursors = make_ahead(3), Source(), cursors_at(4)
    ahead.take("em", 0, 9, cursors, source)
    until(lambda: len(source.done) == 4)
    assert cursors["unlabelled"].position == 4


def test_a_run_that_goes_on_in_the_middle_samples_what_it_would_have(make_ahead: Callable[[int], Ahead]) -> None:
    source, cursors = Source(), cursors_at(0)
    whole = train(make_ahead(2), source, range(6), cursors)
    resumed = train(make_ahead(2), source, range(3, 6), cursors_at(whole[2].cursors["unlabelled"]))
    assert resumed == whole[3:]


def test_what_was_forgotten_is_sampled_again_from_the_position_of_the_taker(
    make_ahead: Callable[[int], Ahead],
) -> None:
    ahead, source, cursors = make_ahead(2), Source(), cursors_at(0)
    expected = train(make_ahead(2), Source(), range(3), copy.deepcopy(cursors))
    taken = train(ahead, source, range(1), cursors, last=9)
    ahead.forget()
    assert taken + train(ahead, source, range(1, 3), cursors) == expected


def test_forgetting_waits_for_what_is_being_sampled_and_drops_the_rest(make_ahead: Callable[[int], Ahead]) -> None:
    ahead, source = make_ahead(3), Source()
    source.gates[1] = threading.Event()
    train(ahead, source, range(1), cursors_at(0), last=9)
    until(lambda: source.begun == [0, 1])
    threading.Timer(0.1, source.gates[1].set).start()
    ahead.forget()
    assert source.done == [0, 1]
    ahead.close()
    assert source.begun == [0, 1]


def test_what_was_begun_for_one_stage_is_not_taken_for_another(make_ahead: Callable[[int], Ahead]) -> None:
    """Even where their iterations have the same numbers."""
    ahead, cursors = make_ahead(2), cursors_at(0)
    train(ahead, Source(), range(1), cursors, stage="rlvr", last=5)
    source = Source(wants=lambda iteration: 3)
    expected = train(make_ahead(2), Source(wants=lambda iteration: 3), range(1, 4), copy.deepcopy(cursors))
    assert train(ahead, source, range(1, 4), cursors, stage="em") == expected
    assert source.begun == [1, 2, 3]


def test_an_exception_reaches_who_takes_that_iteration(make_ahead: Callable[[int], Ahead]) -> None:
    ahead, source, cursors = make_ahead(2), Source(), cursors_at(0)
    source.failures[1] = Halted("server 0 died")
    train(ahead, source, range(1), cursors, last=9)
    with pytest.raises(Halted, match="server 0 died"):
        train(ahead, source, range(1, 2), cursors, last=9)


def test_after_an_exception_the_iteration_can_be_sampled_again(make_ahead: Callable[[int], Ahead]) -> None:
    ahead, source, cursors = make_ahead(2), Source(), cursors_at(0)
    expected = train(make_ahead(2), Source(), range(3), copy.deepcopy(cursors))
    source.failures[0] = Halted("server 0 died")
    with pytest.raises(Halted):
        train(ahead, source, range(1), cursors, last=9)
    assert train(ahead, source, range(3), cursors) == expected


def test_an_exception_that_nobody_took_does_not_stop_the_end(make_ahead: Callable[[int], Ahead]) -> None:
    ahead, source = make_ahead(1), Source()
    source.failures[1] = Halted("server 0 died")
    train(ahead, source, range(1), cursors_at(0), last=9)
    ahead.close()


def test_sampling_ahead_is_alone_and_training_is_not(make_ahead: Callable[[int], Ahead]) -> None:
    """The other ranks train meanwhile: nothing in there may wait for them."""
    source = Source()
    train(make_ahead(1), source, range(2), cursors_at(0))
    assert source.was_alone == [True, True]
    assert not parallel._is_alone.get()
