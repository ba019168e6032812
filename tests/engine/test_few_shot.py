"""Questions after worked ones: what is shown, what is asked, what counts as the response."""

import random

import pytest
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.few_shot import FewShot
from tempo_engine.tasks.question import Question, Split, draw_questions, split_of
from tempo_engine.tasks.signs import Signs
from tempo_engine.tasks.sums import Sums
from tempo_engine.tokenizer import byte_tokenizer, to_prompts

SPLITS: tuple[Split, ...] = ("labelled", "unlabelled", "heldout")
SUMS = FewShot(Sums(terms=(3,)), shots=2)


def drawn(generator: FewShot, count: int = 60) -> list[Question]:
    rng = random.Random(0)
    return [generator.draw(index, rng) for index in range(count)]


def test_a_question_stands_below_worked_ones_and_its_response_below_it() -> None:
    for question in drawn(SUMS):
        first, its_trace, second, other_trace, asked, rest = question.shown.split("\n")
        assert [first, second] == [worked.content for worked in SUMS.worked]
        assert score(SUMS.extract, its_trace, SUMS.worked[0].answers) == 1
        assert score(SUMS.extract, other_trace, SUMS.worked[1].answers) == 1
        assert (asked, rest) == (question.content, "")


def test_every_question_of_every_source_is_shown_after_the_same_worked_ones() -> None:
    questions = [q for split in SPLITS for q in draw_questions(SUMS, split, 20, seed=7, where=f"data.{split}")]
    assert len({q.shown.removesuffix(f"{q.content}\n") for q in questions}) == 1


def test_worked_questions_are_labelled_ones_that_are_never_asked() -> None:
    generator = FewShot(Sums(terms=(2,), largest=3), shots=3)
    worked = {question.content for question in generator.worked}
    assert len(worked) == 3
    assert {split_of(question) for question in generator.worked} == {"labelled"}
    assert not worked & {question.content for question in drawn(generator, 300)}


def test_worked_questions_take_sizes_in_turn_as_the_others_do() -> None:
    generator = FewShot(Signs(terms=(2, 3), largest=4), shots=4)
    assert [str(q.content).split(" = ")[0].count(" ") + 1 for q in generator.worked] == [2, 3, 2, 3]


def test_a_question_is_the_same_one_with_and_without_worked_ones() -> None:
    shown = drawn(SUMS, 1)[0]
    bare = Question(shown.content)
    assert (shown.id, split_of(shown)) == (bare.id, split_of(bare))


def test_the_model_gets_what_is_shown() -> None:
    question = drawn(SUMS, 1)[0]
    prompt = to_prompts([question], byte_tokenizer(), max_tokens=999, where="data")[0]
    assert prompt.text == question.shown
    assert prompt.token_ids == tuple(byte_tokenizer()(question.shown)["input_ids"])
    assert prompt.id == question.id


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("7 + 1 = 8 ; 8 + 6 = 14 ; Answer: 14", "14"),
        ("7 + 1 = 8 ; Answer: 14\n3 + 3 =\n3 + 3 = 6 ; Answer: 6\n", "14"),
        ("7 + 1 = 8\nAnswer: 14", None),
        ("\nAnswer: 14", None),
        ("", None),
    ],
)
def test_only_the_first_line_of_a_response_counts(response: str, answer: str | None) -> None:
    assert SUMS.extract(response) == answer


def test_traces_and_words_are_those_of_the_generator() -> None:
    bare, question = Sums(terms=(3,)), drawn(SUMS, 1)[0]
    assert SUMS.trace_kinds == bare.trace_kinds
    assert SUMS.vocabulary() == bare.vocabulary()
    assert SUMS.trace(question, "slip", random.Random(3)) == bare.trace(question, "slip", random.Random(3))


def test_a_generator_with_too_few_questions_says_so() -> None:
    with pytest.raises(UserError, match=r"shots asks for 4 different questions but its generator found only"):
        FewShot(Sums(terms=(2,), largest=1), shots=4).draw(0, random.Random(0))


class Single(Sums):
    """Has one question."""

    def draw(self, index: int, rng: random.Random) -> Question:
        return Question("2 + 2 =", frozenset({"4"}))  # a labelled one


def test_a_generator_without_another_question_than_the_worked_one_says_so() -> None:
    with pytest.raises(UserError, match="no other questions than the 1 worked ones"):
        FewShot(Single(terms=(2,)), shots=1).draw(0, random.Random(0))
