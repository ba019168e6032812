"""Files of every format give the same rows; what cannot be read is a row with a reason, or a file with a name."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.data.rows import READERS, is_readable, read_rows
from tempo_engine.errors import UserError

ROWS: list[dict[str, Any]] = [{"prompt": "2 + 2?", "answer": "4"}, {"prompt": 'été, \n"?"', "answer": "5"}]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix in (".csv", ".tsv"):
        comma = "," if file.suffix == ".csv" else "\t"
        cells = [list(rows[0]), *(list(row.values()) for row in rows)]
        quoted = [comma.join('"' + cell.replace('"', '""') + '"' for cell in line) for line in cells]
        file.write_text("\r\n".join(quoted), encoding="utf-8")
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows), encoding="utf-8")
    else:
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = list(read_rows(write(tmp_path / f"rows{suffix}", ROWS)))
    assert [row.value for row in rows] == ROWS
    assert [row.number for row in rows] == [1, 2]
    assert not any(row.wrong for row in rows)


def test_a_file_is_called_what_the_caller_calls_it(tmp_path: Path) -> None:
    file = write(tmp_path / "rows.jsonl", ROWS)
    assert [row.file for row in read_rows(file, "org/name/rows.jsonl")] == ["org/name/rows.jsonl"] * 2


def test_a_suffix_nobody_knows_is_read_as_json_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.txt"
    file.write_text('{"prompt": "a"}\n')
    assert [row.value for row in read_rows(file)] == [{"prompt": "a"}]
    assert not is_readable("rows.txt")
    assert is_readable("data/Train.PARQUET")


def test_nested_columns_of_parquet_come_as_lists_and_objects(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "a"}], "reward_model": {"ground_truth": "1", "is_labeled": True}}
    assert [r.value for r in read_rows(write(tmp_path / "rows.parquet", [row]))] == [row]


def test_a_row_of_csv_with_too_few_or_too_many_cells_is_bad_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("prompt,answer\na,1\nb\nc,1,2\nd,4\n")
    assert [row.wrong for row in read_rows(file)] == ["", *["has another number of cells than the header"] * 2, ""]


def test_half_a_character_in_a_json_list_is_bad_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text('[{"prompt": "a"}, {"prompt": "\\ud800"}, {"prompt": "c"}]')
    assert ["surrogates" in row.wrong for row in read_rows(file)] == [False, True, False]


@pytest.mark.parametrize(
    ("name", "data", "sentence"),
    [
        ("a.parquet", b"PAR1 no", "is not a Parquet file"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"a": 1}', "holds a dict, want a list of objects"),
        ("a.csv", b"a,b\n\xff,2\n", "is not CSV in UTF-8"),
        ("a.csv", b'a,b\n"1"x,2\n', "is not CSV in UTF-8"),
    ],
)
def test_a_file_of_another_format_is_refused_by_name(tmp_path: Path, name: str, data: bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name} {sentence}"):
        list(read_rows(tmp_path / name))


@given(data=st.binary(max_size=80), suffix=st.sampled_from(list(READERS)))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_rows_or_a_user_error(tmp_path_factory: pytest.TempPathFactory, data: bytes, suffix: str) -> None:
    file = tmp_path_factory.getbasetemp() / f"any{suffix}"
    file.write_bytes(data)
    assert reads_or_says_why(file)


def reads_or_says_why(file: Path) -> bool:
    try:
        numbers = [row.number for row in read_rows(file)]
    except UserError as error:
        return file.name in str(error)
    return numbers == sorted(numbers)
