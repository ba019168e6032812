"""What every generator of a recipe keeps to, found through the one table that lists them."""

import json
import random
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tempo_em.datasets import load_datasets, tokenizer_for
from tempo_em.loading import load_recipe, parse_setting, resolve
from tempo_em.plan.configs import fresh_vocab_size
from tempo_em.recipe import Recipe
from tempo_em.recipe_generated import GENERATORS, TASKS, GeneratedSource
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import MAX_ANSWER_CHARS, score
from tempo_engine.tasks.question import Generator, Split, check_disjoint, draw_questions, split_of

pytestmark = pytest.mark.usefixtures("fake_gym")
SPLITS: tuple[Split, ...] = ("labelled", "unlabelled", "heldout")
# Beyond their defaults: what a source must have, or a second size.
SETTINGS: dict[str, dict[str, Any]] = {
    "sums": {"terms": [2, 4], "largest": 99},
    "arithmetic": {"terms": [2, 5]},
    "linear": {"unknowns": [1, 2]},
    "modular": {"terms": [2, 6]},
    "knights": {"people": [3, 4]},
    "zebra": {"sizes": [[2, 3], [3, 2]]},
    "word_sort": {"words": [3, 6]},
    "syllogism": {"classes": [3, 4]},
    "dates": {"days": [10, 400]},
    "gym": {"task": "chain_sum"},
    "mix": {
        "of": [{"generator": "sums"}, {"generator": "signs"}, {"generator": "dates"}, {"generator": "syllogism"}],
        "weights": [3, 2, 1, 1],
    },
}
EVERY = pytest.mark.parametrize("name", GENERATORS)


def source(name: str, count: int = 24, **more: Any) -> dict[str, Any]:
    return {"generator": name, "count": count, **SETTINGS.get(name, {}), **more}


def generator(name: str, **more: Any) -> Generator:
    return GENERATORS[name].model_validate(source(name, **more)).generate()


def recipe(labelled: dict[str, Any], *more: str) -> Recipe:
    data = {"labelled": labelled, "unlabelled": source("sums", count=8)}
    content = {"model": {"create": {"model_type": "llama"}}, "data": data}
    return resolve("test", content, [parse_setting(setting) for setting in more]).recipe


def refusal(labelled: dict[str, Any], *more: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe(labelled, *more)
    return str(caught.value)


def drawn(name: str, split: Split = "labelled", count: int = 24, seed: int = 0):
    return draw_questions(generator(name), split, count, seed=seed, where="data")


@EVERY
def test_a_generator_stands_in_the_table_under_the_name_that_recipes_write(name: str) -> None:
    assert get_args(GENERATORS[name].model_fields["generator"].annotation) == (name,)
    assert (GENERATORS[name].__doc__ or "").startswith("Generated: ")
    assert issubclass(GENERATORS[name], GeneratedSource)


@EVERY
def test_questions_belong_to_their_split_differ_and_have_answers_that_can_be_read(name: str) -> None:
    sets = {split: drawn(name, split) for split in SPLITS}
    check_disjoint(sets)
    for split, questions in sets.items():
        assert len({question.id for question in questions}) == 24
        assert {split_of(question) for question in questions} == {split}
        assert all(0 < len(answer) <= MAX_ANSWER_CHARS for question in questions for answer in question.answers)
        assert all(question.answers for question in questions)


@EVERY
def test_the_right_trace_scores_and_no_other_does(name: str) -> None:
    own, rng = generator(name), random.Random(0)
    assert "right" in own.trace_kinds
    assert len(own.trace_kinds) > 1 or name in ("gym", "mix"), "a critic learns from wrong traces"
    for question in drawn(name):
        for kind in own.trace_kinds:
            trace = own.trace(question, kind, rng)
            assert "\n" not in trace, "worked questions before others take one line each"
            assert score(own.extract, trace, question.answers) == (kind == "right")


@EVERY
def test_the_vocabulary_has_every_word_once(name: str) -> None:
    own, rng = generator(name), random.Random(1)
    vocabulary = own.vocabulary()
    assert (vocabulary is None) == (name == "gym")
    if vocabulary is not None:
        assert len(set(vocabulary)) == len(vocabulary)
        for question in drawn(name, count=60):
            texts = [str(question.content), *(own.trace(question, kind, rng) for kind in own.trace_kinds)]
            assert set(" ".join(texts).split()) <= set(vocabulary)


@EVERY
def test_the_same_seed_draws_the_same_questions_and_traces(name: str) -> None:
    own = generator(name)
    assert drawn(name, seed=1) == drawn(name, seed=1)
    assert drawn(name, seed=1) != drawn(name, seed=2)
    question = drawn(name)[0]
    for kind in own.trace_kinds:
        assert own.trace(question, kind, random.Random(5)) == own.trace(question, kind, random.Random(5))


@EVERY
@given(response=st.text() | st.text().map("Answer: {}".format))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_response_is_read_without_error(name: str, response: str) -> None:
    answer = generator(name).extract(response)
    assert answer != ""


@pytest.mark.parametrize("name", [name for name in GENERATORS if name != "gym"])
def test_questions_may_stand_after_worked_ones(name: str) -> None:
    shown = draw_questions(generator(name, shots=2), "labelled", 2, seed=0, where="data")[0].shown
    assert shown.count("\n") == 5


def test_a_recipe_is_described_by_a_json_schema_with_every_generator() -> None:
    schema = json.dumps(Recipe.model_json_schema())
    assert all(f'"const": "{name}"' in schema for name in GENERATORS)


@EVERY
def test_a_resolved_recipe_is_a_recipe_again(name: str) -> None:
    content = {
        "model": {"create": {"model_type": "llama"}},
        "data": {"labelled": source(name), "unlabelled": source("sums")},
    }
    resolved = resolve("test", content, [])
    assert resolve("test", yaml.safe_load(resolved.to_yaml()), []).recipe == resolved.recipe


@pytest.mark.parametrize("name", ["arithmetic", "zebra", "gym", "mix"])
def test_a_fresh_model_has_as_many_tokens_as_its_tokenizer(name: str) -> None:
    drawn_from = recipe(source(name))
    assert fresh_vocab_size(drawn_from) == len(tokenizer_for(load_datasets(drawn_from)))


def test_an_unknown_option_is_answered_with_those_of_its_generator() -> None:
    message = refusal(source("word_sort", wrods=[3]))
    assert message == (
        "data.labelled.wrods is not an option (did you mean words?); data.labelled takes count, shots, generator, words"
    )


def test_an_unknown_option_in_a_mix_is_answered_with_its_place_and_the_options_there() -> None:
    message = refusal(
        {"generator": "mix", "count": 3, "of": [{"generator": "sums"}, {"generator": "word_sort", "count": 3}]}
    )
    assert message == ("data.labelled.of.1.count is not an option; data.labelled.of.1 takes generator, words")


def test_what_no_mix_can_hold_is_answered_with_what_it_can() -> None:
    message = refusal({"generator": "mix", "count": 3, "of": [{"generator": "mix", "of": []}]})
    assert message == f"data.labelled.of.0: the generator is not known; generators: {', '.join(TASKS)}"


def test_a_mix_has_a_weight_for_each_generator() -> None:
    assert "weights has 1 numbers for the 4 generators in of" in refusal(source("mix"), "data.labelled.weights=[2]")


def test_a_task_of_reasoning_gym_outside_the_list_is_refused_with_the_list() -> None:
    message = refusal(source("gym"), "data.labelled.task=countdown")
    assert message.startswith("data.labelled.task: the gym task 'countdown' is not among those whose answers")
    assert "chain_sum" in message


def test_a_set_may_be_named_like_a_generator() -> None:
    assert refusal(source("sums"), "data.evaluation={dates: {generator: dates, count: 3, days: [0]}}").startswith(
        "data.evaluation.dates.days.0: "
    )


def test_another_generator_replaces_a_source_whole() -> None:
    labelled = load_recipe("tiny", ["data.labelled={generator: dates, count: 5}"]).recipe.data.labelled
    assert labelled == GENERATORS["dates"].model_validate({"generator": "dates", "count": 5})
