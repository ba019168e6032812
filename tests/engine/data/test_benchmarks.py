"""Rows in the shape of each benchmark, written for these tests: the prompt is compared word for word. No real item is here."""

import hashlib
import json
from typing import Any

import pytest
from tempo_engine.data import shapes
from tempo_engine.data.benchmarks import BENCHMARKS
from tempo_engine.data.hub import Where
from tempo_engine.data.load import Reading, load
from tempo_engine.data.rows import BadRow
from tempo_engine.tasks.answers import EXTRACTORS, score
from tempo_engine.tasks.question import Question

BOXED = "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{}.\n\nWhat is 6 times 7?"

# Of the template as ZeroEval publishes it: src/templates/ZEBRA_GRID.py.
PUBLISHED_ZEBRA_GRID = "dd4b8c12996ac0342e3ee2ad0e8737ab1e3043c4756a33721709ac92d60e570d"


def question(name: str, row: dict[str, Any]) -> Question:
    return BENCHMARKS[name].question(row)


def letters(letter: str) -> set[str]:
    return {letter, f"({letter})", letter.lower(), f"({letter.lower()})"}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("aime_2024", {"ID": "2024-X-1", "Problem": "What is 6 times 7?", "Solution": "Count.", "Answer": 42}),
        ("aime_2025", {"problem": "What is 6 times 7?", "answer": "042", "id": "0"}),
        ("aime_2026", {"problem": "What is 6 times 7?", "answer": "42", "id": 0}),
        ("beyond_aime", {"problem": "What is 6 times 7?", "answer": 42}),
        ("olymmath", {"problem": "What is 6 times 7?", "answer": "$42$", "subject": "Algebra", "unique_id": "x"}),
        ("agieval_math", {"query": "Q: What is 6 times 7?\nA: The answer is", "answer": "42"}),
    ],
)
def test_a_problem_with_a_box(name: str, row: dict[str, Any]) -> None:
    found = question(name, row)
    assert (found.content, found.shown, found.answers) == ("What is 6 times 7?", BOXED, {"42"})
    assert found.columns == row


def dapo(problem: str, answer: str) -> dict[str, Any]:
    text = (
        "Solve the following math problem step by step. The last line of your response should be of the form Answer: $Answer "
        "(without quotes) where $Answer is the answer to the problem.\n\n"
        f'{problem}\n\nRemember to put your answer on its own line after "Answer:".'
    )
    return {
        "data_source": "math_dapo", "prompt": [{"role": "user", "content": text}], "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"}, "extra_info": {"index": "a-b"},
    }  # fmt: skip


def test_dapo_is_asked_in_its_own_words_and_known_by_its_problem() -> None:
    # removeprefix and removesuffix: this problem begins and ends with letters that stripping by characters would eat.
    row = dapo("Solve: what is 6 times 7 on its own line after", "42")
    found = question("dapo_math_17k", row)
    assert found.content == "Solve: what is 6 times 7 on its own line after"
    assert found.shown == row["prompt"][0]["content"]
    assert found.answers == {"42"}


def test_repeats_of_dapo_are_removed(tmp_path: Any) -> None:
    file = tmp_path / "dapo.jsonl"
    file.write_text("\n".join(json.dumps(dapo(f"What is {i % 3} + 1?", str(i % 3 + 1))) for i in range(30)))
    loaded = load([Where(file=file)], Reading(benchmark=BENCHMARKS["dapo_math_17k"]), "labelled", "data.labelled")
    assert len(loaded.questions) == 3
    assert loaded.intake.left_out == {"repeats": 27}


def test_dolci_gives_a_reference_for_a_judge() -> None:
    row = {
        "prompt": "user: Name a colour.",
        "ground_truth": ["Blue is a colour. " * 30],
        "dataset": ["general-quality_ref"],
    }
    found = question("dolci_rl_zero_general", row)
    assert found.content == "Name a colour."
    assert found.answers == {("Blue is a colour. " * 30).strip()}


CHOICES = """Which is a fruit?

A) stone
B) pear
C) rope
D) salt"""
CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'ANSWER: $LETTER' (without quotes) where LETTER is one of A,B,C,D. Think step by step before answering.\n\n"
)


def test_agieval_is_asked_without_its_few_shot_words() -> None:
    row = {
        "query": "Q: Which is a fruit? Answer Choices: (A)stone (B)pear (C)rope (D)salt\nA: Among A through D, the answer is",
        "choices": ["(A)stone", "(B)pear", "(C)rope", "(D)salt"], "gold": [1],
    }  # fmt: skip
    found = question("agieval", row)
    assert (found.content, found.shown, found.answers) == (CHOICES, CHOICE_PROMPT + CHOICES, letters("B"))


def test_a_choice_of_bbh_is_asked_as_a_choice() -> None:
    choices = {"label": ["A", "B", "C", "D"], "text": ["stone", "pear", "rope", "salt"]}
    found = question("bbh", {"question": "Which is a fruit?", "choices": choices, "target": "(B)"})
    assert (found.content, found.shown, found.answers) == (CHOICES, CHOICE_PROMPT + CHOICES, letters("B"))


@pytest.mark.parametrize(
    ("target", "answers"),
    [("Yes", {"Yes", "yes", "YES"}), ("valid ", {"valid", "Valid", "VALID"}), ("24", {"24"}), ("] >", {"] >"})],
)
def test_a_short_answer_of_bbh_counts_in_any_case(target: str, answers: set[str]) -> None:
    found = question("bbh", {"question": "Is it so?", "target": target})
    assert found.shown == (
        "Answer the following question. The last line of your response should be of the following format: 'ANSWER: $ANSWER' "
        "(without quotes) where $ANSWER is the answer to the question. Think step by step before answering.\n\nIs it so?"
    )
    assert found.answers == answers


def test_a_row_of_bbh_whose_target_is_no_choice_is_bad() -> None:
    choices = {"label": ["A", "B"], "text": ["earth", " wind"]}
    with pytest.raises(BadRow, match="names 3 as the right one of 2 choices"):
        question("bbh", {"question": "Which is funny?", "choices": choices, "target": "(D)"})


def gpqa(text: str) -> dict[str, Any]:
    names = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    return {"Question": text, **dict(zip(names, ("pear\n", "stone", "rope", "salt"), strict=True)), "Record ID": "r"}


def test_choices_of_gpqa_are_shuffled_by_the_question_alone() -> None:
    found = question("gpqa_diamond", gpqa("Which is a fruit?"))
    assert found == question("gpqa_diamond", gpqa("Which is a fruit?"))
    assert found.content == "Which is a fruit?\n\nA) stone\nB) rope\nC) salt\nD) pear"
    assert found.answers == letters("D")
    assert found.shown == CHOICE_PROMPT + str(found.content)


def test_the_right_choice_of_gpqa_is_anywhere_equally_often() -> None:
    right = [min(question("gpqa_diamond", gpqa(f"Question {i}?")).answers & set("ABCD")) for i in range(400)]
    assert all(75 <= right.count(letter) <= 125 for letter in "ABCD")


def test_a_grid_of_zebralogic_is_asked_for_as_json() -> None:
    solution = {"header": ["House", "Name", "Pet"], "rows": [["1", "Ann", "cat"], ["2", "Bob", "dog"]]}
    found = question("zebralogic", {"id": "x", "size": "2*2", "puzzle": "There are 2 houses.", "solution": solution})
    assert found.content == "There are 2 houses."
    assert found.shown.startswith(
        "\n# Example Puzzle \n\nThere are 3 houses, numbered 1 to 3 from left to right, as seen from"
    )
    assert found.shown.endswith(
        "# Puzzle to Solve \n\nThere are 2 houses.\n\n\n# Instruction\n\n"
        "Now please solve the above puzzle. Present your reasoning and solution in the following json format:\n\n"
        '{\n    "reasoning": "___",\n    "solution": {\n'
        '        "House 1": {\n            "Name": "___",\n            "Pet": "___"\n        },\n'
        '        "House 2": {\n            "Name": "___",\n            "Pet": "___"\n        }\n    }\n}\n\n'
    )
    grid = {"House 1": {"Name": "Ann", "Pet": "cat"}, "House 2": {"Name": "Bob", "Pet": "dog"}}
    assert [json.loads(answer) for answer in found.answers] == [grid]
    assert "Ann" not in found.shown


def test_the_prompt_of_zebralogic_is_the_published_one() -> None:
    assert hashlib.sha256(shapes.GRID.encode()).hexdigest() == PUBLISHED_ZEBRA_GRID


GRID_ROWS: list[Any] = [
    {}, {"header": ["House"], "rows": []}, {"header": ["House", "Name"], "rows": [["1", "___"]]},
    {"header": ["House", "Name"], "rows": [["1"]]}, {"header": 3, "rows": [["1"]]}, None,
]  # fmt: skip


@pytest.mark.parametrize("solution", GRID_ROWS)
def test_a_grid_that_is_hidden_or_broken_is_a_bad_row(solution: Any) -> None:
    with pytest.raises(BadRow):
        question("zebralogic", {"puzzle": "There are 2 houses.", "solution": solution})


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize(
    "row", [{}, {"prompt": None, "problem": 3, "query": "", "question": [], "puzzle": {}, "Question": 1}]
)
def test_a_row_of_another_shape_is_a_bad_row(name: str, row: dict[str, Any]) -> None:
    with pytest.raises(BadRow):
        question(name, row)


@pytest.mark.parametrize(
    ("name", "row", "right", "wrong"),
    [
        ("aime_2025", {"problem": "6 times 7?", "answer": "042"}, "So \\boxed{42}.", "So \\boxed{41}."),
        ("dapo_math_17k", dapo("6 times 7?", "42"), "Counting.\nAnswer: $42$", "Answer: 4"),
        ("gpqa_diamond", gpqa("Which is a fruit?"), "It grows.\nANSWER: D", "ANSWER: A"),
        ("bbh", {"question": "Is it so?", "target": "Yes"}, "ANSWER: yes.", "ANSWER: no"),
    ],
)
def test_a_response_in_the_form_that_is_asked_for_is_right(
    name: str, row: dict[str, Any], right: str, wrong: str
) -> None:
    extract, answers = EXTRACTORS[BENCHMARKS[name].extract], question(name, row).answers
    assert score(extract, right, answers) == 1.0
    assert score(extract, wrong, answers) == 0.0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_where_it_lies_and_under_which_licence(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.about
    assert benchmark.licence
    for place in benchmark.parts.values():
        assert place.file is None
        assert place.hub.count("/") == 1
        assert place.revision is None or (len(place.revision) == 40 and int(place.revision, 16))
    assert benchmark.places(None) == list(benchmark.parts.values())


def test_subsets_are_read_alone() -> None:
    assert [place.config for place in BENCHMARKS["bbh"].places("word_sorting")] == ["word_sorting"]
    assert len(BENCHMARKS["bbh"].places(None)) == 27
