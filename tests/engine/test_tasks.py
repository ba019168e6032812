"""Generated questions and their worked responses, checked by arithmetic done here; and splits that never overlap."""

import itertools
import random
import re
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import score
from tempo_engine.tasks.question import Generator, Question, Split, check_disjoint, draw_questions, split_of
from tempo_engine.tasks.signs import Signs
from tempo_engine.tasks.sums import Sums
from tempo_engine.tasks.swaps import Swaps

SPLITS: tuple[Split, ...] = ("labelled", "unlabelled", "heldout")
GENERATORS: dict[str, Generator] = {
    "signs": Signs(terms=(2, 3, 5), largest=6),
    "signs of 1 and 2": Signs(terms=(2,), largest=2),
    "unique signs": Signs(terms=(4,), largest=9, unique=True),
    "sums": Sums(terms=(2, 4), largest=99),
    "sums of 0 and 1": Sums(terms=(2,), largest=1),
    "swaps": Swaps(terms=(2, 3, 5)),
    "unique swaps": Swaps(terms=(4,), unique=True),
}
SIGNS = {name: generator for name, generator in GENERATORS.items() if isinstance(generator, Signs)}
SUMS = {name: generator for name, generator in GENERATORS.items() if isinstance(generator, Sums)}
EXAMPLE = Question("3 5 1 2 = (5)", frozenset({"+3+5-1-2"}))


def drawn(generator: Generator, count: int = 60) -> list[tuple[Question, random.Random]]:
    rng = random.Random(0)
    return [(generator.draw(index, rng), rng) for index in range(count)]


def signed(question: Question) -> tuple[list[int], int]:
    numbers, target = str(question.content).split(" = ")
    return [int(n) for n in numbers.split()], int(target[1:-1])


def solutions(question: Question) -> set[str]:
    """Every choice of signs that reaches the target, by trying all."""
    numbers, target = signed(question)
    choices = itertools.product((1, -1), repeat=len(numbers))
    reached = [choice for choice in choices if sum(s * n for s, n in zip(choice, numbers, strict=True)) == target]
    return {"".join(f"{s * n:+d}" for s, n in zip(choice, numbers, strict=True)) for choice in reached}


def steps(response: str) -> list[tuple[int, int]]:
    """Signed number and remainder of each step."""
    return [(int(number), int(rest)) for number, rest in re.findall(r"(\S+) \((\S+)\)", response)]


def false_steps(question: Question, response: str) -> int:
    """How many remainders do not follow from the one before."""
    rests = [signed(question)[1]] + [rest for _, rest in steps(response)]
    return sum(before - number != after for before, (number, after) in zip(rests, steps(response), strict=False))


@pytest.mark.parametrize("generator", SIGNS.values(), ids=SIGNS)
def test_a_signs_question_knows_every_right_answer(generator: Signs):
    for question, _ in drawn(generator):
        assert question.answers == solutions(question)


@pytest.mark.parametrize("terms", [2, 3, 4, 7])
def test_a_unique_signs_question_has_exactly_one_answer(terms: int):
    for question, _ in drawn(Signs(terms=(terms,), largest=4, unique=True)):
        assert len(solutions(question)) == 1


def test_a_unique_signs_question_never_wants_all_plus_or_all_minus():
    for question, _ in drawn(Signs(terms=(2, 3), largest=4, unique=True)):
        numbers, target = signed(question)
        assert abs(target) != sum(numbers)


class Impatient(random.Random):
    """Gives up where an endless loop would go on."""

    asked = 0

    def randint(self, a: int, b: int) -> int:
        self.asked += 1
        if self.asked > 5_000:
            raise TimeoutError("drew 5000 numbers for one question")
        return super().randint(a, b)


def test_a_generator_without_any_unique_question_says_so():
    with pytest.raises(UserError):
        Signs(terms=(2,), largest=1, unique=True).draw(0, Impatient())


@pytest.mark.parametrize("generator", SIGNS.values(), ids=SIGNS)
def test_signs_numbers_lie_between_1_and_the_largest(generator: Signs):
    numbers = [number for question, _ in drawn(generator) for number in signed(question)[0]]
    assert min(numbers) == 1
    assert max(numbers) == generator.largest


@pytest.mark.parametrize("generator", SIGNS.values(), ids=SIGNS)
def test_a_right_signs_trace_scores_right_and_every_step_holds(generator: Signs):
    for question, rng in drawn(generator):
        trace = generator.trace(question, "right", rng)
        assert score(generator.extract, trace, question.answers) == 1
        assert false_steps(question, trace) == 0
        assert steps(trace)[-1][1] == 0


@pytest.mark.parametrize("generator", SIGNS.values(), ids=SIGNS)
def test_a_missed_signs_trace_scores_wrong_with_honest_arithmetic(generator: Signs):
    for question, rng in drawn(generator):
        trace = generator.trace(question, "miss", rng)
        assert score(generator.extract, trace, question.answers) == 0
        assert false_steps(question, trace) == 0
        assert steps(trace)[-1][1] != 0


@pytest.mark.parametrize("generator", SIGNS.values(), ids=SIGNS)
def test_a_fudged_signs_trace_scores_wrong_although_it_ends_on_0(generator: Signs):
    for question, rng in drawn(generator):
        trace = generator.trace(question, "fudge", rng)
        assert score(generator.extract, trace, question.answers) == 0
        assert trace.endswith("(0)")


@pytest.mark.parametrize("generator", SIGNS.values(), ids=SIGNS)
def test_a_fudged_signs_trace_has_exactly_one_false_step(generator: Signs):
    for question, rng in drawn(generator):
        assert false_steps(question, generator.trace(question, "fudge", rng)) == 1


@pytest.mark.parametrize("kind", ["right", "miss", "fudge"])
def test_a_signs_trace_uses_the_numbers_of_its_question_in_order(kind: str):
    generator = Signs(terms=(5,))
    for question, rng in drawn(generator):
        trace = generator.trace(question, kind, rng)
        assert [abs(number) for number, _ in steps(trace)] == signed(question)[0]


def test_the_documented_signs_response_is_read_and_right():
    answer = Signs(terms=(4,)).extract("+3 (2) +5 (-3) -1 (-2) -2 (0)")
    assert answer == "+3+5-1-2"
    assert {answer} <= EXAMPLE.answers


@pytest.mark.parametrize(
    "response",
    [
        "",
        "+3",
        "+3 (2) +5",
        "3 (2)",
        "+3 (2) 5 (-3)",
        "+3(2)",
        "+3  (2)",
        "+3 (2)+5 (-3)",
        "+3 (2) so +5 (-3)",
        "I say +3 (2)",
        "+3 (2) .",
        "+3 (+2)",
        "+3 2",
        "+3.5 (2)",
        "+ 3 (2)",
        "(2) +3",
    ],
)
def test_malformed_signs_responses_have_no_answer(response: str):
    assert Signs(terms=(4,)).extract(response) is None


@given(st.text() | st.lists(st.sampled_from(["+3", "(2)", "-1", "(-2)", " ", "(", "0"])).map(" ".join))
@settings(deadline=None)
def test_signs_extraction_reads_any_text_without_error(response: str):
    answer = Signs(terms=(4,)).extract(response)
    assert answer is None or re.fullmatch(r"([+-]\d+)+", answer)


@pytest.mark.parametrize("generator", SUMS.values(), ids=SUMS)
def test_a_sums_question_knows_its_sum(generator: Sums):
    for question, _ in drawn(generator):
        numbers = str(question.content).removesuffix(" =").split(" + ")
        assert question.answers == {str(sum(map(int, numbers)))}


@pytest.mark.parametrize("generator", SUMS.values(), ids=SUMS)
def test_a_right_sums_trace_scores_right_and_every_step_holds(generator: Sums):
    for question, rng in drawn(generator):
        trace = generator.trace(question, "right", rng)
        assert score(generator.extract, trace, question.answers) == 1
        assert all(int(a) + int(b) == int(c) for a, b, c in re.findall(r"(\d+) \+ (\d+) = (\d+)", trace))


@pytest.mark.parametrize("generator", SUMS.values(), ids=SUMS)
def test_a_slipped_sums_trace_scores_wrong_with_exactly_one_false_step(generator: Sums):
    for question, rng in drawn(generator):
        trace = generator.trace(question, "slip", rng)
        written = re.findall(r"(\d+) \+ (\d+) = (\d+)", trace)
        assert score(generator.extract, trace, question.answers) == 0
        assert sum(int(a) + int(b) != int(c) for a, b, c in written) == 1


def test_the_documented_sums_trace_is_written():
    trace = Sums(terms=(3,)).trace(Question("7 + 1 + 6 ="), "right", random.Random(0))
    assert trace == "7 + 1 = 8 ; 8 + 6 = 14 ; Answer: 14"


@pytest.mark.parametrize("response", ["", "14", "7 + 1 = 8 ; 8 + 6 = 14", "Answer 14", "Answer:"])
def test_malformed_sums_responses_have_no_answer(response: str):
    assert Sums(terms=(3,)).extract(response) is None


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_every_word_of_prompts_and_traces_is_in_the_vocabulary(generator: Generator):
    vocabulary = set(generator.vocabulary() or ())
    for question, rng in drawn(generator, 200):
        texts = [str(question.content), *(generator.trace(question, kind, rng) for kind in generator.trace_kinds)]
        assert set(" ".join(texts).split()) <= vocabulary


@pytest.mark.parametrize("kind", ["right", "miss", "fudge"])
def test_the_furthest_signs_remainders_are_in_the_vocabulary(kind: str):
    # All-minus towards the all-plus target goes as far away as arithmetic can.
    generator = Signs(terms=(3,), largest=2)
    rng = random.Random(0)
    words = {word for _ in range(200) for word in generator.trace(Question("2 2 2 = (6)"), kind, rng).split()}
    assert words <= set(generator.vocabulary())


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_a_vocabulary_has_no_repeats(generator: Generator):
    vocabulary = generator.vocabulary() or []
    assert len(set(vocabulary)) == len(vocabulary)


@pytest.mark.parametrize("generator", GENERATORS.values(), ids=GENERATORS)
def test_sizes_are_drawn_in_turn(generator: Generator):
    sizes = [len(re.findall(r"\d+", str(question.content).split(" =")[0])) for question, _ in drawn(generator, 12)]
    assert sizes == list(itertools.islice(itertools.cycle(generator.terms), 12))  # pyright: ignore[reportAttributeAccessIssue]


@given(st.lists(st.integers(), min_size=3, max_size=3), st.lists(st.integers(0, 8), min_size=3, max_size=3))
@settings(deadline=None)
def test_splits_never_overlap_whatever_their_seeds(seeds: list[int], counts: list[int]):
    generator = Signs(terms=(2,), largest=4)
    sources = {
        split: draw_questions(generator, split, count, seed=seed, where=f"data.{split}")
        for split, seed, count in zip(SPLITS, seeds, counts, strict=True)
    }
    check_disjoint(sources)
    contents = [question.content for questions in sources.values() for question in questions]
    assert len(set(contents)) == len(contents) == sum(counts)


@given(st.integers(), st.sampled_from(SPLITS), st.integers(0, 10))
@settings(deadline=None)
def test_drawn_questions_belong_to_their_split_and_differ(seed: int, split: Split, count: int):
    questions = draw_questions(Sums(terms=(2, 3)), split, count, seed=seed, where="data")
    assert {split_of(question) for question in questions} <= {split}
    assert len({question.content for question in questions}) == count


def test_the_same_seed_draws_the_same_questions():
    def draw(seed: int) -> Sequence[Question]:
        return draw_questions(Sums(terms=(3,)), "labelled", 20, seed=seed, where="data")

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_drawn_set_holds_equally_many_of_each_size():
    questions = draw_questions(Sums(terms=(2, 3, 4)), "heldout", 9, seed=0, where="data")
    assert [str(question.content).count("+") for question in questions] == [1, 2, 3] * 3


def test_more_questions_than_exist_are_refused_with_the_number_found():
    with pytest.raises(UserError, match=r"data\.labelled asks for 50 different questions but .* found only \d+"):
        draw_questions(Sums(terms=(2,), largest=1), "labelled", 50, seed=0, where="data.labelled")


def test_half_of_the_questions_are_labelled_and_a_quarter_each_unlabelled_and_held_out():
    splits = [split_of(Question(str(number))) for number in range(4000)]
    shares = [splits.count(split) / 4000 for split in SPLITS]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.03)


def test_a_question_s_id_and_split_do_not_depend_on_its_answers():
    known, unknown = Question("3 5 = (8)", frozenset({"+3+5"})), Question("3 5 = (8)")
    assert (known.id, split_of(known)) == (unknown.id, split_of(unknown))


def test_a_question_s_id_never_changes():
    # Checkpoints and splits rest on it.
    assert Question("3 5 = (8)").id == "d2a2abfc6f26e738"
    assert Question((("user", "3 5 = (8)"),)).id == "a59c3fb6b195bc27"


def test_a_shared_question_is_refused_with_both_owners():
    sources = {"data.labelled": [Question("a"), Question("b")], "data.unlabelled": [Question("c"), Question("b")]}
    with pytest.raises(UserError, match=r"data\.unlabelled and data\.labelled share a question \('b'\)"):
        check_disjoint(sources)


def test_a_question_may_repeat_within_its_own_source():
    check_disjoint({"data.labelled": [Question("a"), Question("a")], "data.unlabelled": [Question("b")]})
