"""Sources of rows -> questions, with an account of what was read: files and their hashes, columns, repeats, bad rows."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from tempo_engine.data.benchmarks import Benchmark
from tempo_engine.data.columns import Columns, entry, is_labelled, passes, recognise
from tempo_engine.data.hub import Snapshot, Where, fetch
from tempo_engine.data.intake import Intake
from tempo_engine.data.questions import answers_of, question_of
from tempo_engine.data.rows import BadRow, Row, read_rows
from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question, Split
from tempo_engine.verify.kinds import KINDS, Kind

# What a verifier that reads columns is given of a benchmark beside its row.
ASKED, REFERENCE = "prompt", "answer"


@dataclass(frozen=True)
class Reading:
    """How rows become questions. A `benchmark` knows its columns; otherwise `prompt` and `answer` name them (None: no answers).

    `kind` is what right answers are and how they are spelled; None: they stay in the row, for who reads columns.
    """

    prompt: str = "prompt"
    answer: str | None = "answer"
    filter: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    max_bad_rows: float = 0
    benchmark: Benchmark | None = None
    kind: Kind | None = KINDS["exact"]


@dataclass
class Loaded:
    """The questions of a source, and an account of it: what `data.json` of a run says."""

    intake: Intake
    columns: Columns | None
    files: list[dict[str, Any]]

    @property
    def questions(self) -> list[Question]:
        return list(self.intake.questions.values())

    def account(self) -> dict[str, Any]:
        """Files with their hashes (and commits), columns, counts, and a hash of the questions in their order."""
        return {
            "files": self.files,
            "columns": str(self.columns) if self.columns else None,
            "rows": self.intake.num_rows,
            "questions": len(self.intake.questions),
            "left_out": dict(self.intake.left_out) | {"bad": len(self.intake.quarantine)},
            "content": content_hash(self.questions),
        }

    def sentence(self) -> str:
        """One line for the user: what was read and how."""
        name = ", ".join(
            dict.fromkeys(f["hub"] + "@" + f["commit"][:8] if "hub" in f else f["path"] for f in self.files)
        )
        counts = self.intake.left_out | {"bad": len(self.intake.quarantine)}
        out = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        columns = f" ({self.columns})" if self.columns else ""
        left_out = f"; left out: {out}" if out else ""
        return f"{self.intake.where}: {len(self.intake.questions):,} questions of {name}{columns}{left_out}"


def load(places: Sequence[Where], reading: Reading, split: Split, name: str) -> Loaded:
    """The questions at these places, in order, without repeats of the same content. Rows that a flag gives to the other kind of
    training set are left out; so is what the filter does not want.

    Raises UserError for files that cannot be read, for more bad rows than are allowed, and when there is no question at all.
    """
    intake = Intake(name, reading.max_bad_rows)
    loaded = Loaded(intake, None, [])
    rows = chain.from_iterable(_rows_at(place, loaded.files) for place in places)
    for row in rows:
        if reading.limit is not None and len(intake.questions) >= reading.limit:
            break
        intake.num_rows += 1
        try:
            _take(row, reading, split, loaded)
        except BadRow as error:
            intake.refuse(row, str(error))
    intake.check()
    if not intake.questions:
        left_out = ", ".join(f"{count} {what}" for what, count in intake.left_out.items())
        why = (
            f": of its {intake.num_rows} rows {left_out} were left out"
            if left_out
            else "; it needs one JSON object a line"
        )
        raise UserError(f"the data file {_names(places)} holds no questions{why}")
    return loaded


def _take(row: Row, reading: Reading, split: Split, loaded: Loaded) -> None:
    if row.wrong:
        raise BadRow(row.wrong)
    if not isinstance(row.value, dict):
        raise BadRow(f"holds a {type(row.value).__name__}, want an object with the column {reading.prompt!r}")
    if not passes(row.value, reading.filter):
        loaded.intake.left_out["not of the filter"] += 1
        return
    if reading.benchmark:
        loaded.intake.take(_of_benchmark(row.value, reading.benchmark, reading.kind), row)
        return
    columns = loaded.columns or recognise(row.value, reading.prompt, reading.answer)
    if columns.flag and split != "heldout":
        flag = is_labelled(row.value, columns.flag)
        if flag is not None and flag != (split == "labelled"):
            loaded.intake.left_out["of the other kind"] += 1
            return
        if flag is False and columns.answer and entry(row.value, columns.answer) in (None, ""):
            loaded.intake.take(_question(row.value, columns, None), row)
            return
    question = _question(row.value, columns, reading.kind)
    loaded.columns = columns  # what one good row says, holds for all
    loaded.intake.take(question, row)


def _question(row: Mapping[str, Any], columns: Columns, kind: Kind | None) -> Question:
    if kind is None:
        return question_of(row, replace(columns, answer=None), KINDS["exact"])
    return question_of(row, columns, kind)


def _of_benchmark(row: Mapping[str, Any], benchmark: Benchmark, kind: Kind | None) -> Question:
    question = benchmark.question(row)
    if kind is not None:
        return replace(question, answers=answers_of(sorted(question.answers), kind))
    reference = min(question.answers, key=lambda answer: (len(answer), answer))
    return replace(question, columns={**row, ASKED: question.shown or question.content, REFERENCE: reference})


def _rows_at(place: Where, files: list[dict[str, Any]]) -> Iterator[Row]:
    """Rows of a place, file after file; each file is entered into `files` with its hash before its first row."""
    if place.file is not None:
        snapshot = Snapshot("", "", {str(place.file): place.file})
    else:
        snapshot = fetch(place)
    for name, path in snapshot.files.items():
        if not path.is_file():
            raise UserError(f"the data file {path} does not exist")
        origin = {"hub": snapshot.repo, "commit": snapshot.commit} if snapshot.repo else {}
        files.append({"path": name, **origin, "sha256": _sha256(path)})
        yield from read_rows(path, f"{snapshot.repo}/{name}" if snapshot.repo else name)


def _names(places: Sequence[Where]) -> str:
    return ", ".join(str(place.file or place.hub) for place in places)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(questions: Sequence[Question]) -> str:
    """One hash of questions and their answers, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        digest.update(f"{question.id} {sorted(question.answers)!r}\n".encode())
    return digest.hexdigest()
