"""Rows -> questions: which columns are taken, what is left out and counted, how many bad rows are too many."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.data.columns import Columns, recognise
from tempo_engine.data.hub import Where
from tempo_engine.data.load import Loaded, Reading, load
from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question, Split

VERL: dict[str, Any] = {
    "data_source": "math", "prompt": [{"role": "user", "content": "1 + 1?"}], "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": 0},
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


def read(file: Path, *rows: Any, split: Split = "heldout", **reading: Any) -> Loaded:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return load([Where(file=file)], Reading(**reading), split, "data.x")


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "a", "answer": 1}, Columns("prompt", "answer", None)),
        ({"prompt": "a", "solution": 1}, Columns("prompt", "solution", None)),
        ({"problem": "a", "solution": "long", "answer": 1}, Columns("problem", "answer", None)),
        ({"question": "a", "ground_truth": 1}, Columns("question", "ground_truth", None)),
        (VERL, Columns("prompt", "reward_model.ground_truth", None)),
        (
            {**VERL, "reward_model": {"ground_truth": "2", "is_labeled": False}},
            Columns("prompt", "reward_model.ground_truth", "reward_model.is_labeled"),
        ),
        ({"text": "a"}, Columns("prompt", "answer", None)),
    ],
)
def test_the_rows_of_trl_and_verl_are_recognised(row: dict[str, Any], columns: Columns) -> None:
    assert recognise(row, "prompt", "answer") == columns


def test_what_the_recipe_says_is_not_guessed_again() -> None:
    row = {"prompt": "a", "question": "b", "answer": 1, "solution": 2}
    assert recognise(row, "question", "solution") == Columns("question", "solution", None)
    assert recognise(row, "prompt", None) == Columns("prompt", None, None)
    assert recognise({"prompt": "a", "solution": 1}, "prompt", "gold").answer == "gold"


def test_a_row_of_verl_becomes_a_question_with_its_columns(file: Path) -> None:
    loaded = read(file, VERL)
    assert loaded.questions == [Question((("user", "1 + 1?"),), frozenset({"2"}))]
    assert loaded.questions[0].columns["data_source"] == "math"
    assert loaded.questions[0].columns["extra_info"] == {"index": 0}
    assert loaded.sentence() == f"data.x: 1 questions of {file} (prompt = prompt, answer = reward_model.ground_truth)"


def flagged(text: str, answer: Any, flag: Any) -> dict[str, Any]:
    return {"prompt": text, "reward_model": {"ground_truth": answer, "is_labeled": flag}}


def test_one_file_feeds_both_training_sets(file: Path) -> None:
    rows = [flagged("a", "1", True), flagged("b", "2", False), flagged("c", "3", 1), flagged("d", None, 0)]
    labelled, unlabelled = read(file, *rows, split="labelled"), read(file, *rows, split="unlabelled")
    assert [q.content for q in labelled.questions] == ["a", "c"]
    assert [q.content for q in unlabelled.questions] == ["b", "d"]
    assert [q.answers for q in unlabelled.questions] == [{"2"}, frozenset()]
    assert labelled.intake.left_out == unlabelled.intake.left_out == {"of the other kind": 2}
    assert "labelled where reward_model.is_labeled); left out: 2 of the other kind" in labelled.sentence()


def test_an_evaluation_set_takes_rows_of_both_kinds(file: Path) -> None:
    assert len(read(file, flagged("a", "1", True), flagged("b", "2", False)).questions) == 2


def test_a_flag_that_says_neither_yes_nor_no_is_a_bad_row(file: Path) -> None:
    with pytest.raises(UserError, match=r"line 1 has 'maybe' in the column 'reward_model.is_labeled', want true or"):
        read(file, flagged("a", "1", "maybe"), split="labelled")


def test_a_file_without_rows_of_the_wanted_kind_says_what_it_has(file: Path) -> None:
    with pytest.raises(UserError, match="holds no questions: of its 1 rows 1 of the other kind were left out"):
        read(file, flagged("a", "1", True), split="unlabelled")


def test_a_filter_takes_rows_with_one_of_its_values_in_each_column(file: Path) -> None:
    rows = [
        {"prompt": f"{year}{part}", "answer": 1, "year": year, "x": {"part": part}}
        for year in (2024, 2025)
        for part in "IJ"
    ]
    loaded = read(file, *rows, filter={"year": "2025", "x.part": ["I", "K"]})
    assert [q.content for q in loaded.questions] == ["2025I"]
    assert loaded.intake.left_out == {"not of the filter": 3}
    with pytest.raises(UserError, match="line 1 has no column 'level'"):
        read(file, *rows, filter={"level": 1})


def test_repeats_are_left_out_and_counted(file: Path) -> None:
    loaded = read(file, *[{"prompt": "a", "answer": i} for i in range(5)], {"prompt": "b", "answer": 7})
    assert loaded.questions == [Question("a", frozenset({"0"})), Question("b", frozenset({"7"}))]
    assert loaded.account()["rows"] == 6
    assert loaded.account()["left_out"] == {"repeats": 4, "bad": 0}


BAD = ["oops", {"answer": 1}, {"prompt": "a", "answer": ""}, {"prompt": 3, "answer": 1}, "[]", '{"prompt": "\\ud800", "answer": 1}',
       {"prompt": "a", "answer": "x" * 301}]  # fmt: skip
GOOD = [{"prompt": f"good {i}", "answer": i} for i in range(13)]


def test_bad_rows_are_kept_aside_with_place_and_reason(file: Path) -> None:
    loaded = read(file, *GOOD, *BAD, max_bad_rows=len(BAD))
    assert len(loaded.questions) == len(GOOD)
    found = loaded.intake.quarantine
    assert [bad.row for bad in found] == list(range(len(GOOD) + 1, len(GOOD) + len(BAD) + 1))
    assert {bad.file for bad in found} == {str(file)}
    starts = [
        "is not JSON",
        "has no column 'prompt'",
        "the answer must be 1 to 300 characters",
        "the prompt must be",
        "holds a list",
        "is not JSON",
    ]
    assert all(bad.reason.startswith(start) for bad, start in zip(found, starts, strict=False))


@pytest.mark.parametrize("bad", BAD)
def test_without_a_bound_the_first_bad_row_stops(file: Path, bad: Any) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, line 14"):
        read(file, *GOOD, bad)


def test_one_bad_row_more_than_the_bound_stops(file: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"data\.x has 3 bad rows, max_bad_rows is 2; the last one: .*line 16: the answer must be 1 to 300",
    ):
        read(file, *GOOD, *BAD, max_bad_rows=2)


def test_a_share_is_of_all_rows(file: Path) -> None:
    assert len(read(file, *GOOD, *BAD, max_bad_rows=0.35).questions) == 13
    with pytest.raises(UserError, match=r"data\.x has 7 bad rows, max_bad_rows is 0.34 of 20 rows"):
        read(file, *GOOD, *BAD, max_bad_rows=0.34)


def test_a_prompt_that_is_dropped_later_counts_as_a_bad_row(file: Path) -> None:
    loaded = read(file, *GOOD, max_bad_rows=1)
    loaded.intake.drop(loaded.questions[3], "the prompt has 9 tokens")
    assert len(loaded.questions) == 12
    assert loaded.intake.quarantine[0].row == 4
    with pytest.raises(UserError, match=r"data\.x has 2 bad rows, max_bad_rows is 1"):
        loaded.intake.drop(loaded.questions[0], "the prompt has 9 tokens")


def test_the_account_changes_with_the_file_and_with_the_questions(file: Path) -> None:
    first, again = read(file, *GOOD).account(), read(file, *GOOD).account()
    other = read(file, *GOOD[:-1], {"prompt": "good 12", "answer": 13}).account()
    assert first == again
    assert first["files"][0]["sha256"] != other["files"][0]["sha256"]
    assert first["content"] != other["content"]
    assert first["files"][0]["path"] == str(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["prompt", "problem", "answer", "solution", "reward_model", "is_labeled", "ground_truth"])


@given(rows=st.lists(st.dictionaries(names, json_values, max_size=4) | json_values, min_size=1, max_size=5))
@settings(deadline=None)
def test_any_rows_are_read_or_counted_or_a_user_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any]
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    assert adds_up_or_says_why(file, rows)


def adds_up_or_says_why(file: Path, rows: list[Any]) -> bool:
    try:
        intake = read(file, *map(json.dumps, rows), split="labelled", max_bad_rows=9).intake
    except UserError as error:
        return "any.jsonl" in str(error)
    return len(intake.questions) + len(intake.quarantine) + intake.left_out.total() == len(rows)
