"""Dates so many days apart, counted month by month.

prompt    What date is 45 days after 10 February 2024 ? End with "Answer: day month year".
response  10 February 2024 + 45 ; 1 March 2024 + 25 ; 26 March 2024 ; Answer: 26 March 2024

prompt    How many days are there from 10 February 2024 to 26 March 2024 ? End with "Answer: N".
response  10 February 2024 : 0 ; 1 March 2024 : 20 ; 26 March 2024 : 45 ; Answer: 45
"""

import calendar
import datetime
import random
import re
from dataclasses import dataclass

from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import answer_words, ask, asked, words_of

# Not strftime's, which speaks the user's language.
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
FIRST_DATE, LAST_DATE = datetime.date(2000, 1, 1), datetime.date(2039, 12, 31)
DAY = datetime.timedelta(days=1)
_DATE = re.compile(rf"(\d+) ({'|'.join(MONTHS)}) (\d+)")
_DAYS = re.compile(r"(\d+) days")

# The dates on the way, each with the days still to go.
Walk = list[tuple[datetime.date, int]]


@dataclass(frozen=True)
class Dates:
    """Dates up to `days` days apart (a list: sizes in turn): the date after or before another, or the days between two."""

    days: tuple[int, ...]

    trace_kinds = ("right", "slip")

    def draw(self, index: int, rng: random.Random) -> Question:
        days = rng.randint(1, self.days[index % len(self.days)])
        start = FIRST_DATE + rng.randint(0, (LAST_DATE - FIRST_DATE).days) * DAY
        form = rng.choice(("after", "before", "between"))
        if form == "between":
            text = f"How many days are there from {_written(start)} to {_written(start + days * DAY)} ?"
            return Question(ask(text, "N"), frozenset({str(days)}))
        end = start + (days if form == "after" else -days) * DAY
        text = f"What date is {days} days {form} {_written(start)} ?"
        return Question(ask(text, "day month year"), frozenset({_written(end).lower()}))

    def trace(self, question: Question, kind: str, rng: random.Random) -> str:
        """`right`: every step holds. `slip`: one step is a day too long or too short, as if its month had another length."""
        text = asked(str(question.content))
        start, *end = (_date(*found) for found in _DATE.findall(text))
        days = (end[0] - start).days if end else int(_DAYS.findall(text)[0])
        direction = -1 if " before " in text else 1
        walk = _walk(start, direction, days)
        slip_at, slip = rng.randrange(1, len(walk)) if kind == "slip" else len(walk), rng.choice((1, -1))
        if end:
            counts = [days - left + (slip if step >= slip_at else 0) for step, (_, left) in enumerate(walk)]
            steps = [f"{_written(date)} : {count}" for (date, _), count in zip(walk, counts, strict=True)]
            return " ; ".join([*steps, f"Answer: {counts[-1]}"])
        walk = _walk(start, direction, days, slip_at, slip)
        steps = [f"{_written(date)} {'+' if direction > 0 else '-'} {left}" for date, left in walk[:-1]]
        last = _written(walk[-1][0])
        return " ; ".join([*steps, last, f"Answer: {last}"])

    def extract(self, response: str) -> str | None:
        return answer_words(response)

    def vocabulary(self) -> list[str]:
        furthest = max(self.days) + 1
        years = range(FIRST_DATE.year - furthest // 365 - 1, LAST_DATE.year + furthest // 365 + 2)
        numbers = map(str, [*range(max(furthest, 31) + 1), *years])
        texts = [
            ask("How many days are there from to ?", "N"),
            ask("What date is days after before ?", "day month year"),
        ]
        return words_of([*texts, "+ - : ; Answer:", *MONTHS, *numbers])


def _walk(start: datetime.date, direction: int, days: int, slip_at: int | None = None, slip: int = 0) -> Walk:
    """From the start to the first of each next month (backwards: the last of each month before) and on to the end.

    After the step `slip_at` there are `slip` days more to go, where that is possible, else one more.
    """
    date, left = start, days
    walk = [(date, left)]
    while left:
        length = calendar.monthrange(date.year, date.month)[1]
        stride = min(left, length + 1 - date.day if direction > 0 else date.day)
        date, left = date + direction * stride * DAY, left - stride
        if len(walk) == slip_at:
            left = left + slip if left + slip >= 0 else 1
        walk.append((date, left))
    return walk


def _written(date: datetime.date) -> str:
    return f"{date.day} {MONTHS[date.month - 1]} {date.year}"


def _date(day: str, month: str, year: str) -> datetime.date:
    return datetime.date(int(year), MONTHS.index(month) + 1, int(day))
