"""What a source gave: questions, and what was left out and why. Bad rows are kept aside, up to a bound."""

from collections import Counter
from dataclasses import dataclass, field

from tempo_engine.data.rows import Row
from tempo_engine.errors import UserError
from tempo_engine.tasks.question import Question


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that gave no question: Quarantined("train.jsonl", 7, "is not JSON: Expecting value").

    Of its content a reason has at most the value that is wrong, cut short.
    """

    file: str
    row: int
    reason: str


@dataclass
class Intake:
    """The questions of one source while it is read.

    `max_bad_rows` is a number of rows or, below 1, a share of them. With 0 the first bad row stops the run with its reason.
    """

    where: str
    max_bad_rows: float = 0
    questions: dict[str, Question] = field(default_factory=dict)
    places: dict[str, Row] = field(default_factory=dict)
    quarantine: list[Quarantined] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    num_rows: int = 0

    def take(self, question: Question, row: Row) -> None:
        """Keep a question, unless its content was there before."""
        if question.id in self.questions:
            self.left_out["repeats"] += 1
            return
        self.questions[question.id] = question
        self.places[question.id] = Row(row.file, row.number, row.unit, None)

    def refuse(self, row: Row, reason: str) -> None:
        """Put a row aside. Raises UserError when it is one too many, but for a share only `check` can know that."""
        reason = reason.removeprefix(": ")
        self.quarantine.append(Quarantined(row.file, row.number, reason))
        if self.max_bad_rows == 0 or 1 <= self.max_bad_rows < len(self.quarantine):
            self._stop(row, reason)

    def drop(self, question: Question, reason: str) -> None:
        """Put a question aside that was taken before. Raises UserError as `refuse` does."""
        del self.questions[question.id]
        self.refuse(self.places[question.id], reason)

    def check(self) -> None:
        """Raises UserError when the share of bad rows is too large."""
        if 0 < self.max_bad_rows < 1 and len(self.quarantine) > self.max_bad_rows * self.num_rows:
            last = self.quarantine[-1]
            self._stop(Row(last.file, last.row, "row", None), last.reason)

    def _stop(self, row: Row, reason: str) -> None:
        joint = ": " if reason.startswith(("the ", "an ", "a ")) else " "
        sentence = f"{row.file}, {row.unit} {row.number}{joint}{reason}"
        if self.max_bad_rows:
            bound = (
                f"{self.max_bad_rows:.3g}"
                if self.max_bad_rows >= 1
                else f"{self.max_bad_rows:.3g} of {self.num_rows} rows"
            )
            sentence = (
                f"{self.where} has {len(self.quarantine)} bad rows, max_bad_rows is {bound}; the last one: {sentence}; "
                "mend the rows or raise the bound"
            )
        raise UserError(sentence)
