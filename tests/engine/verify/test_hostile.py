"""Responses written to crash, to hang, to execute or to be taken for right: none does, whatever kind of answer is asked for.

hostile.jsonl: `say` is a list of [text, times]; `gold` is the right answer, which none of them gives. MARKER is a file that must
not appear.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.tasks.answers import EXTRACTORS, Extract
from tempo_engine.verify import ExactMatch
from tempo_engine.verify.expression import Expression
from tempo_engine.verify.kinds import KINDS
from tempo_engine.verify.pool import Pool

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in Path(__file__).with_name("hostile.jsonl").read_text(encoding="utf-8").splitlines()
]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(1, seconds=1.0)
    yield pool
    pool.close()


def item(gold: str, kind: str) -> Labelled:
    read = KINDS[kind].read(gold)
    return Labelled(Prompt("q", "", (5,)), frozenset() if read is None else frozenset({read}))


def said(text: str) -> Rollout:
    return Rollout(Prompt("q", "", (5,)), [2], [-1.0], ((0, 1),), False, text)


def spoken(row: dict[str, Any], marker: Path) -> str:
    return "".join(text.replace("MARKER", str(marker)) * times for text, times in row["say"])


@pytest.mark.parametrize("kind", [name for name in KINDS if name != "expression"])
@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_no_hostile_response_is_right_by_its_spelling(row: dict[str, Any], kind: str, tmp_path: Path):
    response, question = said(spoken(row, tmp_path / "x")), item(row["gold"], kind)
    for find in EXTRACTORS.values():
        assert ExactMatch(KINDS[kind].extract(find)).rewards([response], [question]) == [0.0]


def test_no_hostile_response_is_right_in_mathematics(pool: Pool, tmp_path: Path):
    """All in one batch, as in training, with an honest response at its end: it is right, so nothing was disturbed."""
    marker = tmp_path / "marker"
    texts = [spoken(row, marker) for row in ROWS]
    for find in EXTRACTORS.values():
        verifier = Expression(KINDS["expression"].extract(find), pool)
        honest = {"boxed": r"\boxed{6 \cdot 7}", "answer_line": r"Answer: 6 \cdot 7", "whole": r"6 \cdot 7"}
        asked = [said(text) for text in [*texts, honest[name_of(find)]]]
        questions = [item(row["gold"], "expression") for row in ROWS]
        rewards = verifier.rewards(asked, [*questions, item("42", "expression")])
        names = [row["name"] for row in ROWS]
        assert [name for name, reward in zip(names, rewards, strict=False) if reward] == []
        assert rewards[-1] == 1.0
    assert not marker.exists()


def name_of(find: Extract) -> str:
    return next(name for name, extract in EXTRACTORS.items() if extract is find)


@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_votes_read_hostile_responses_too(row: dict[str, Any], tmp_path: Path):
    """What they extract can be written down as JSON and read back, as rollouts between ranks are."""
    for name, kind in KINDS.items():
        for find in EXTRACTORS.values():
            answer = Expression(kind.extract(find), Pool(0)).extract(spoken(row, tmp_path / "x"))
            assert answer is None or json.loads(json.dumps(answer)) == answer, name


# Mathematics at random, with what makes it expensive.
mathematics = st.lists(
    st.sampled_from(
        [
            *"0123456789xyn+-*/^_!=<>(){}[]|,.; ",
            "\\frac",
            "\\sqrt",
            "\\cdot",
            "\\sum",
            "\\int",
            "\\pi",
            "\\infty",
            "\\in",
        ]
    )
    | st.text(max_size=2),
    max_size=24,
).map("".join)


@given(answer=mathematics, gold=st.sampled_from(["42", r"\frac{1}{2}", "x + 1", "(1, 2)", r"\text{yes}"]))
@example(answer="\ud800", gold="x + 1")
@example(answer='", "', gold="x + 1")
@settings(deadline=None, max_examples=60)
def test_any_text_is_judged_within_its_time_and_alike_the_second_time(pool: Pool, answer: str, gold: str):
    verifier = Expression(lambda response: response or None, pool)
    first, second = (verifier.rewards([said(answer)], [item(gold, "expression")]) for _ in range(2))
    assert first == second
    assert first[0] in (0.0, 1.0)
    pool.metrics()


@given(st.text(alphabet=st.characters(exclude_categories=())))
@settings(deadline=None)
def test_text_from_a_pool_is_sent_as_one_line(text: str):
    assert "\n" not in json.dumps((text, text))
