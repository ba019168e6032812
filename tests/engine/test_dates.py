"""Dates, counted here by the day number, and the steps month by month."""

import datetime
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.dates import MONTHS, Dates
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.wording import ask, asked


def dates_in(text: str) -> list[datetime.date]:
    found = re.findall(r"(\d+) ([A-Z][a-z]+) (\d+)", text)
    return [datetime.date(int(year), MONTHS.index(month) + 1, int(day)) for day, month, year in found]


def expected(question: Question) -> str:
    text = asked(str(question.content))
    dates = dates_in(text)
    if len(dates) == 2:
        return str(dates[1].toordinal() - dates[0].toordinal())
    days = int(re.findall(r"is (\d+) days", text)[0])
    end = datetime.date.fromordinal(dates[0].toordinal() + (days if "after" in text else -days))
    return f"{end.day} {MONTHS[end.month - 1].lower()} {end.year}"


@pytest.mark.parametrize(
    ("text", "trace"),
    [
        (
            "What date is 45 days after 10 February 2024 ?",
            "10 February 2024 + 45 ; 1 March 2024 + 25 ; 26 March 2024 ; Answer: 26 March 2024",
        ),
        (
            "What date is 45 days after 10 February 2023 ?",
            "10 February 2023 + 45 ; 1 March 2023 + 26 ; 27 March 2023 ; Answer: 27 March 2023",
        ),
        (
            "What date is 3 days before 2 January 2001 ?",
            "2 January 2001 - 3 ; 31 December 2000 - 1 ; 30 December 2000 ; Answer: 30 December 2000",
        ),
        (
            "How many days are there from 10 February 2024 to 26 March 2024 ?",
            "10 February 2024 : 0 ; 1 March 2024 : 20 ; 26 March 2024 : 45 ; Answer: 45",
        ),
        (
            "What date is 1 days after 31 December 2020 ?",
            "31 December 2020 + 1 ; 1 January 2021 ; Answer: 1 January 2021",
        ),
    ],
)
def test_traces_of_known_dates_are_written(text: str, trace: str) -> None:
    assert Dates(days=(60,)).trace(Question(ask(text, "N")), "right", random.Random(0)) == trace


@given(st.integers(0, 2**32), st.sampled_from([1, 40, 800]))
@settings(deadline=None, max_examples=150)
def test_answers_are_right_steps_lead_there_and_a_slip_is_a_day_off(seed: int, days: int) -> None:
    generator, rng = Dates((days,)), random.Random(seed)
    question = generator.draw(0, rng)
    assert question.answers == {expected(question)}
    right, slip = (generator.trace(question, kind, rng) for kind in ("right", "slip"))
    assert generator.extract(right) == expected(question)
    assert score(generator.extract, slip, question.answers) == 0
    if "between" in right or " : " in right:
        assert abs(int(generator.extract(slip) or 0) - int(expected(question))) == 1
    else:
        assert abs((dates_in(slip)[-1] - dates_in(right)[-1]).days) == 1
    assert set(f"{question.content} {right} {slip}".split()) <= set(generator.vocabulary())
