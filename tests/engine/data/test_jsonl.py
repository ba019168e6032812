"""Question files: what is read, and that whatever is wrong with a file is said with its place."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tempo_engine.data.hub import Where
from tempo_engine.data.load import Reading, load
from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question
from tempo_engine.verify.kinds import KINDS


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "questions.jsonl"


def write(file: Path, *rows: Any) -> Path:
    """Rows that are text are written as they are, others as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def read(file: Path, **reading: Any) -> list[Question]:
    return load([Where(file=file)], Reading(**reading), "heldout", "data.labelled").questions


def row(prompt: Any, answer: Any = 1) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer}


def test_questions_are_read_in_order(file: Path):
    write(file, row("b", "+2"), row("a", 1))
    assert read(file) == [Question("b", frozenset({"2"})), Question("a", frozenset({"1"}))]


@pytest.mark.parametrize(
    ("answer", "read_as"),
    [("025", {"25"}), (25, {"25"}), (25.0, {"25"}), (0.5, {"0.5"}), (["1,000", 1000, "x"], {"1000", "x"})],
)
def test_answers_are_canonical(file: Path, answer: Any, read_as: set[str]):
    assert read(write(file, row("q", answer)))[0].answers == read_as


def test_without_an_answer_column_no_answer_is_read(file: Path):
    write(file, row("q", {"anything": None}))
    assert read(file, answer=None) == [Question("q")]


def test_columns_have_the_names_that_are_asked_for(file: Path):
    write(file, {"problem": "q", "solution": 7, "prompt": "no"})
    assert read(file, prompt="problem", answer="solution") == [Question("q", frozenset({"7"}))]


def test_messages_are_read_as_pairs(file: Path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?", "name": "x"}]
    assert read(write(file, row(messages)))[0].content == (("system", "Be brief."), ("user", "2 + 2?"))


def test_repeats_are_left_out_and_the_first_one_counts(file: Path):
    write(file, row("a", 1), row("b", 2), row("a", 3))
    assert read(file) == [Question("a", frozenset({"1"})), Question("b", frozenset({"2"}))]


def test_blank_lines_are_skipped_but_counted(file: Path):
    write(file, row("a"), "", "  ", "oops")
    with pytest.raises(UserError, match="line 4 is not JSON"):
        read(file)


def test_the_limit_counts_different_questions(file: Path):
    write(file, row("a"), row("a"), row("b"), row("c"))
    assert [question.content for question in read(file, limit=2)] == ["a", "b"]


def test_lines_beyond_the_limit_are_not_read(file: Path):
    write(file, row("a"), "not JSON")
    assert len(read(file, limit=1)) == 1


def test_unicode_line_separators_do_not_end_a_line(file: Path):
    file.write_text('{"prompt": "a\u2028b\x85c", "answer": "\u00e9"}\n', encoding="utf-8")
    assert read(file) == [Question("a\u2028b\x85c", frozenset({"\u00e9"}))]


def test_windows_line_ends_are_read(file: Path):
    file.write_bytes(b'{"prompt": "a", "answer": 1}\r\n{"prompt": "b", "answer": 2}\r\n')
    assert len(read(file)) == 2


@pytest.mark.parametrize("line", ["{", "prompt", '{"prompt": "a",}', "{'prompt': 'a'}", "[" * 100_000, "\ufeff{}"])
def test_a_line_that_is_not_json_is_named(file: Path, line: str):
    with pytest.raises(UserError, match=r"questions\.jsonl, line 2 is not JSON"):
        read(write(file, row("a"), line))


@pytest.mark.parametrize(("line", "kind"), [("[]", "list"), ("3", "int"), ('"text"', "str"), ("null", "NoneType")])
def test_a_line_that_is_no_object_is_named(file: Path, line: str, kind: str):
    with pytest.raises(UserError, match=f"line 1 holds a {kind}, want an object with the column 'prompt'"):
        read(write(file, line))


@pytest.mark.parametrize("column", ["prompt", "answer"])
def test_a_missing_column_is_answered_with_the_columns_there_are(file: Path, column: str):
    broken = {key: value for key, value in row("a").items() if key != column} | {"id": 3}
    with pytest.raises(UserError, match=f"line 2 has no column '{column}'; its columns are .*id"):
        read(write(file, row("b"), broken))


@pytest.mark.parametrize(
    "prompt", [None, 3, "", "  ", [], {}, ["text"], [{"role": "user"}], [{"content": "x"}], [row("a")]]
)
def test_a_prompt_that_is_neither_text_nor_messages_is_named(file: Path, prompt: Any):
    with pytest.raises(UserError, match="line 1: the prompt must be text or a list of messages"):
        read(write(file, row(prompt)))


@pytest.mark.parametrize("answer", [None, True, [], {}, [None], ["1", True], [["1"]]])
def test_an_answer_that_is_neither_text_nor_number_is_named(file: Path, answer: Any):
    with pytest.raises(UserError, match="line 1: the answer must be text, a number or a list of them"):
        read(write(file, row("a", answer)))


@pytest.mark.parametrize("text", ["", "\n\n", "   \n\t\n"])
def test_an_empty_file_is_refused(file: Path, text: str):
    file.write_text(text)
    with pytest.raises(UserError, match="holds no questions"):
        read(file)


def test_a_missing_file_is_refused_by_name(file: Path):
    with pytest.raises(UserError, match=r"questions\.jsonl does not exist"):
        read(file)


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path)


def test_bytes_that_are_not_utf_8_are_refused(file: Path):
    file.write_bytes(b'{"prompt": "caf\xe9", "answer": 1}\n')
    with pytest.raises(UserError, match=r"questions\.jsonl"):
        read(file)


def test_an_integer_too_long_for_python_is_refused(file: Path):
    file.write_text('{"prompt": "a", "answer": ' + "7" * 5000 + "}")
    with pytest.raises(UserError, match="line 1"):
        read(file)


@pytest.mark.parametrize("content", [None, ["part"], {"type": "text"}, 3])
def test_a_message_without_text_is_refused(file: Path, content: Any):
    with pytest.raises(UserError, match="line 1"):
        read(write(file, row([{"role": "user", "content": content}])))


def test_a_prompt_with_half_a_surrogate_pair_is_refused(file: Path):
    with pytest.raises(UserError, match="line 1"):
        read(write(file, '{"prompt": "\\ud800", "answer": 1}'))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=6,
)
rows = st.fixed_dictionaries({}, optional={"prompt": json_values, "answer": json_values}).map(json.dumps)
texts = st.lists(rows | json_values.map(json.dumps) | st.text(max_size=20), max_size=4).map("\n".join)


def parses_or_says_why(folder: Path, data: bytes) -> bool:
    file = folder / "any.jsonl"
    file.write_bytes(data)
    try:
        return all(isinstance(question.id, str) for question in read(file))
    except UserError as error:
        return "any.jsonl" in str(error)


@given(text=texts)
@settings(deadline=None)
def test_any_text_file_parses_or_raises_a_user_error(tmp_path_factory: pytest.TempPathFactory, text: str):
    assert parses_or_says_why(tmp_path_factory.getbasetemp(), text.encode())


@given(data=st.binary(max_size=64))
@example(data=b"\xff")
@settings(deadline=None)
def test_any_binary_file_parses_or_raises_a_user_error(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    assert parses_or_says_why(tmp_path_factory.getbasetemp(), data)


# --- Kinds of answers --------------------------------------------------------------------------------------------------------


def test_right_answers_are_spelled_as_their_kind_spells_them(file: Path):
    write(file, row("q", ["(b)", "C."]))
    assert read(file, kind=KINDS["choice"])[0].answers == {"B", "C"}


def test_a_right_answer_of_another_kind_is_named(file: Path):
    write(file, row("p", 3), row("q", "three"))
    with pytest.raises(UserError, match=r"line 2: the answer must be an integer, .* got 'three'"):
        read(file, kind=KINDS["int"])


def test_a_grid_may_be_an_object(file: Path):
    cells = {"House 1": {"Name": "Eric"}}
    write(file, row("p", cells), row("q", json.dumps(cells)))
    one, other = read(file, kind=KINDS["grid"])
    assert one.answers == other.answers == {'{"house 1 / name": "eric"}'}


def test_an_answer_without_a_kind_stays_in_its_row(file: Path):
    """Functions and judges read columns: what an answer is, or whether there is one, is their affair."""
    write(file, row("q", {"any": None}) | {"level": 3}, {"prompt": "p"})
    kept, bare = read(file, kind=None)
    assert kept.answers == bare.answers == frozenset()
    assert kept.columns == {"prompt": "q", "answer": {"any": None}, "level": 3}
    assert bare.columns == {"prompt": "p"}
