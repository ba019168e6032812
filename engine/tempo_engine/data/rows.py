"""Rows of a file, whatever its format: JSON lines, a JSON list, CSV or Parquet. Nothing in a file is ever executed."""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tempo_engine.errors import UserError, first_sentence

# Rows of a Parquet file that are in memory at a time.
BATCH_ROWS = 1024


class BadRow(ValueError):
    """A row that gives no question, and why: a sentence that goes on after the row's place."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row and its place: Row("train.jsonl", 7, "line", {"prompt": "2 + 2?", "answer": 4}). `wrong` says why there is no value."""

    file: str
    number: int
    unit: str
    value: Any
    wrong: str = ""


def read_rows(path: Path, name: str | None = None) -> Iterator[Row]:
    """The rows of a file by its suffix, in order, numbered from 1; `name` is what messages call the file.

    A row that cannot be read is a row with a reason. Raises UserError for a file that is missing or cannot be read at all.
    """
    name = name or str(path)
    if not path.is_file():
        raise UserError(f"the data file {name} does not exist")
    return _reader(path)(path, name)


def is_readable(name: str) -> bool:
    """Whether a file of this name holds rows that can be read."""
    return name.lower().endswith(tuple(READERS))


def _reader(path: Path) -> "Reader":
    # A file that says nothing else holds JSON lines, as it always did.
    return next((read for suffix, read in READERS.items() if path.name.lower().endswith(suffix)), _json_lines)


def _json_lines(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _json_row(line, name, number)


def _json_row(line: bytes, name: str, number: int) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
        _refuse_half_characters(value)
    except (ValueError, RecursionError) as error:  # ValueError: bad JSON, bad UTF-8, integers of thousands of digits
        return Row(name, number, "line", None, f"is not JSON: {first_sentence(error)}")
    return Row(name, number, "line", value)


def _refuse_half_characters(value: Any) -> None:
    """JSON can spell lone surrogates, which are no text: nothing downstream could encode them. Raises ValueError for them."""
    json.dumps(value, ensure_ascii=False).encode("utf-8")


def _json_list(path: Path, name: str) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"the data file {name} is not JSON: {first_sentence(error)}") from error
    if not isinstance(values, list):
        raise UserError(f"the data file {name} holds a {type(values).__name__}, want a list of objects (or .jsonl)")
    for number, value in enumerate(values, 1):
        try:
            _refuse_half_characters(value)
        except ValueError as error:
            yield Row(name, number, "row", None, f"is not text: {first_sentence(error)}")
        else:
            yield Row(name, number, "row", value)


def _csv(path: Path, name: str) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            for number, row in enumerate(rows, 1):
                is_whole = None not in row and None not in row.values()
                wrong = "" if is_whole else "has another number of cells than the header"
                yield Row(name, number, "row", row if is_whole else None, wrong)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"the data file {name} is not CSV in UTF-8: {first_sentence(error)}") from error


def _parquet(path: Path, name: str) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"reading {name} needs pyarrow: pip install 'tempo-engine[hub]'") from error
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(name, number, "row", value)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"the data file {name} is not a Parquet file: {first_sentence(error)}") from error


Reader = Callable[[Path, str], Iterator[Row]]
READERS: dict[str, Reader] = {
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json_list, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
