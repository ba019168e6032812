"""The cursor: whole epochs, and one number that is enough to go on."""

from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.cursor import Cursor


@given(st.integers(1, 12), st.text(max_size=5))
@settings(deadline=None)
def test_every_epoch_holds_each_item_once(num_items: int, seed: str):
    cursor = Cursor(range(num_items), seed=seed)
    for _ in range(3):
        assert sorted(cursor.next(num_items)) == list(range(num_items))


@given(st.integers(1, 7), st.lists(st.integers(0, 9), max_size=6))
@settings(deadline=None)
def test_small_steps_walk_the_same_way_as_one_large_one(num_items: int, counts: list[int]):
    cursor = Cursor(range(num_items), seed="s")
    walked = [item for count in counts for item in cursor.next(count)]
    assert walked == Cursor(range(num_items), seed="s").next(sum(counts))
    assert cursor.position == sum(counts)


@given(st.integers(1, 7), st.integers(0, 20), st.integers(0, 20))
@settings(deadline=None)
def test_the_position_is_all_it_takes_to_go_on(num_items: int, before: int, after: int):
    cursor = Cursor(range(num_items), seed="s")
    cursor.next(before)
    resumed = Cursor(range(num_items), seed="s")
    resumed.position = cursor.position
    assert resumed.next(after) == cursor.next(after)


def test_a_cursor_can_be_put_back():
    cursor = Cursor("abcdefgh", seed="s")
    first = cursor.next(20)
    cursor.position = 0
    assert cursor.next(20) == first


def test_one_call_may_take_more_than_an_epoch():
    assert sorted(Cursor("ab", seed="s").next(5)[:4]) == ["a", "a", "b", "b"]


def test_taking_nothing_moves_nothing():
    cursor = Cursor("ab", seed="s")
    assert cursor.next(0) == []
    assert cursor.position == 0


def test_epochs_are_shuffled_anew():
    cursor = Cursor(range(50), seed="s")
    assert cursor.next(50) != cursor.next(50)


def test_another_seed_walks_another_way():
    assert Cursor(range(50), seed="s").next(50) != Cursor(range(50), seed="t").next(50)


def test_the_walk_never_changes():
    # Runs resume by position: another shuffle would repeat some questions and skip others.
    assert Cursor("abcde", seed="labelled/0").next(10) == list("ecbadaebcd")


def test_the_items_are_not_reordered_in_place():
    items = list(range(20))
    Cursor(items, seed="s").next(30)
    assert items == list(range(20))
