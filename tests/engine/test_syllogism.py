"""What follows, decided here by looking at every possible population of three classes."""

import itertools
import random
import re

import pytest
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.question import Question
from tempo_engine.tasks.syllogism import Syllogism
from tempo_engine.tasks.wording import ask, asked


def question(premises: str, conclusion: str) -> Question:
    return Question(ask(f"{premises} Does it follow that {conclusion}?", "valid or invalid"))


def sentences(of: Question) -> list[tuple[str, str, str, str]]:
    """(all, no or some; class; "not " or nothing; class) of each premise and then the conclusion."""
    return re.findall(r"(all|no|some) (\w+) are (not )?(\w+)[.?]", asked(str(of.content)).lower())


def holds(sentence: tuple[str, str, str, str], population: list[frozenset[str]]) -> bool:
    form, a, negated, b = sentence
    those = [(b in person) != bool(negated) for person in population if a in person]
    return {"all": all(those), "no": not any(those), "some": any(those)}[form]


def is_valid(of: Question, *, peopled: bool) -> bool:
    *premises, conclusion = sentences(of)
    classes = sorted({name for _, a, _, b in premises for name in (a, b)})
    kinds = [frozenset(c) for size in range(len(classes) + 1) for c in itertools.combinations(classes, size)]
    for chosen in itertools.product((False, True), repeat=len(kinds)):
        population = [kind for kind, is_there in zip(kinds, chosen, strict=True) if is_there]
        if peopled and any(all(name not in person for person in population) for name in classes):
            continue
        if all(holds(p, population) for p in premises) and not holds(conclusion, population):
            return False
    return True


@pytest.mark.parametrize(
    ("premises", "conclusion", "verdict"),
    [
        ("All artists are bakers. No bakers are poets.", "no artists are poets", "valid"),
        ("All artists are bakers. All bakers are poets.", "all artists are poets", "valid"),
        ("All artists are bakers. All poets are bakers.", "all artists are poets", "invalid"),
        ("Some artists are bakers. All bakers are poets.", "some artists are poets", "valid"),
        ("Some artists are bakers. Some bakers are poets.", "some artists are poets", "invalid"),
        ("All bakers are artists. Some bakers are not poets.", "some artists are not poets", "valid"),
    ],
)
def test_well_known_forms_get_their_verdicts(premises: str, conclusion: str, verdict: str) -> None:
    trace = Syllogism(classes=(3,)).trace(question(premises, conclusion), "right", random.Random(0))
    assert trace.endswith(f"Answer: {verdict}")


def test_the_documented_trace_is_written() -> None:
    asked_for = question("All artists are bakers. No bakers are poets.", "no artists are poets")
    trace = Syllogism(classes=(3,)).trace(asked_for, "right", random.Random(0))
    assert trace == "A artists B bakers C poets ; possible - B AB C ; some A C : none ; Answer: valid"


def test_a_verdict_is_that_of_all_populations_whether_or_not_a_class_may_be_empty() -> None:
    generator, rng = Syllogism(classes=(3,)), random.Random(0)
    for index in range(30):
        drawn = generator.draw(index, rng)
        verdict = "valid" if is_valid(drawn, peopled=False) else "invalid"
        assert drawn.answers == {verdict}
        assert is_valid(drawn, peopled=True) == is_valid(drawn, peopled=False)


@pytest.mark.parametrize("classes", [3, 4, 5])
def test_traces_give_the_verdict_and_slips_the_other(classes: int) -> None:
    generator, rng = Syllogism((classes,)), random.Random(classes)
    verdicts = []
    for index in range(40):
        drawn = generator.draw(index, rng)
        verdicts += drawn.answers
        assert len(sentences(drawn)) == classes
        for kind in generator.trace_kinds:
            assert score(generator.extract, generator.trace(drawn, kind, rng), drawn.answers) == (kind == "right")
    assert 8 < verdicts.count("valid") < 32
