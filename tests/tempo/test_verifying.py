"""`verifier` of a question file, from the recipe's word to rewards."""

import json
from pathlib import Path
from typing import Any

import pytest
from tempo_em.loading import load_recipe
from tempo_em.recipe_data import JsonlSource
from tempo_em.sources import load_rows
from tempo_em.verifying import make_pool
from tempo_engine.errors import UserError
from tempo_engine.rollout import Labelled, Prompt, Rollout


def source(folder: Path, rows: list[dict[str, Any]], **options: Any) -> JsonlSource:
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return JsonlSource.model_validate({"jsonl": str(file), **options})


def rewards(source: JsonlSource, *texts: str) -> list[float]:
    """Of responses to the file's first question."""
    loaded, verifier = load_rows(source, "labelled", "data.labelled", make_pool())
    question = loaded.questions[0]
    prompt = Prompt(question.id, str(question.content), (5,))
    item = Labelled(prompt, question.answers, question.columns)
    responses = [Rollout(prompt, [2], [-1.0], ((0, 1),), False, text) for text in texts]
    try:
        return verifier.rewards(responses, [item] * len(texts))
    finally:
        verifier.close()


def test_without_a_word_answers_are_compared_as_ever(tmp_path: Path):
    plain = source(tmp_path, [{"prompt": "q", "answer": "(A)"}])
    assert rewards(plain, r"\boxed{(A)}", r"\boxed{A}") == [1.0, 0.0]


@pytest.mark.parametrize(
    ("kind", "answer", "right", "wrong"),
    [
        ("exact", "x + 1", "x  + 1", "1 + x"),
        ("int", "1000", r"1{,}000", "1000 m"),
        ("choice", "(A)", "**a**", "B"),
        ("text", "The Nile", "nile.", "Amazon"),
        ("expression", r"\frac{1}{2}", "0.5", "0.25"),
    ],
)
def test_a_word_chooses_the_kind_of_answer(tmp_path: Path, kind: str, answer: str, right: str, wrong: str):
    chosen = source(tmp_path, [{"prompt": "q", "answer": answer}], verifier=kind, extract="answer_line")
    assert rewards(chosen, f"Answer: {right}", f"Answer: {wrong}", right) == [1.0, 0.0, 0.0]


def test_a_grid_is_found_wherever_extract_looks(tmp_path: Path):
    cells = {"House 1": {"Name": "Eric"}}
    chosen = source(tmp_path, [{"prompt": "q", "answer": cells}], verifier="grid")
    assert rewards(chosen, f"So: {json.dumps({'solution': cells})}", r"\boxed{Eric}") == [1.0, 0.0]


RECIPE = """
model: {create: {model_type: llama}}
data:
  labelled: {jsonl: a.jsonl, verifier: VERIFIER}
  unlabelled: {jsonl: b.jsonl, answer: null}
"""


def load(folder: Path, verifier: str, *settings: str) -> Any:
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.replace("VERIFIER", verifier), encoding="utf-8")
    return load_recipe(str(file), list(settings)).recipe.data.labelled


def test_a_recipe_takes_the_word_and_so_does_a_setting(tmp_path: Path):
    assert load(tmp_path, "int").verifier.type == "int"
    assert load(tmp_path, "{function: 'rewards:score'}").verifier.function == "rewards:score"
    assert load(tmp_path, "int", "data.labelled.verifier=grid").verifier.type == "grid"


@pytest.mark.parametrize(
    "wrong",
    [
        "integer",
        "{type: number}",
        "{kind: int}",
        "{type: int, function: rewards:score}",
        "{judge: {url: localhost, model: m}}",
        "{judge: {url: 'http://h/v1'}}",
        "{judge: {url: 'http://h/v1', model: m, prompt: hello}}",
    ],
)
def test_an_unknown_word_is_answered_with_the_place(tmp_path: Path, wrong: str):
    with pytest.raises(UserError, match=r"data\.labelled\.verifier"):
        load(tmp_path, wrong)
