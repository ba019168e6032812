"""Sources of rows in a recipe: one line each, their settings, and how their questions are asked."""

from pathlib import Path
from typing import Any

import pytest
from tempo_em.loading import parse_setting, resolve
from tempo_em.recipe_data import DatasetSource, HubSource, JsonlSource, ParquetSource
from tempo_em.sources import extractor, load_rows, sources_of, style_of
from tempo_engine.data import shapes
from tempo_engine.data.benchmarks import BENCHMARKS
from tempo_engine.data.style import Style
from tempo_engine.errors import UserError
from tempo_engine.tasks.answers import answer_line, boxed

SIGNS = {"generator": "signs", "count": 4}


def recipe(labelled: dict[str, Any], *settings: str, **data: Any) -> Any:
    content = {
        "model": {"create": {"model_type": "llama"}},
        "data": {"labelled": labelled, "unlabelled": SIGNS, **data},
    }
    return resolve("test", content, [parse_setting(setting) for setting in settings]).recipe


def refusal(labelled: dict[str, Any], *settings: str, **data: Any) -> str:
    with pytest.raises(UserError) as caught:
        recipe(labelled, *settings, **data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ({"jsonl": "a.jsonl"}, JsonlSource),
        ({"parquet": "a.parquet"}, ParquetSource),
        ({"hub": "org/name", "config": "en", "split": "test", "filter": {"year": 2025}}, HubSource),
        ({"dataset": "aime_2025"}, DatasetSource),
        ({"dataset": "bbh", "subset": "word_sorting"}, DatasetSource),
    ],
)
def test_a_source_is_known_by_the_key_that_says_where_it_lies(source: dict[str, Any], kind: type) -> None:
    assert type(recipe(source).data.labelled) is kind


def test_a_recipe_with_such_sources_is_the_same_after_writing_and_reading() -> None:
    source = {"hub": "org/name", "filter": {"year": 2025, "part": ["I", "II"]}, "max_bad_rows": 0.02}
    written = recipe(source, system="Think.", enable_thinking=False).model_dump(mode="json")
    assert resolve("again", written, []).recipe.model_dump(mode="json") == written


def test_published_sets_may_have_a_few_bad_rows_and_files_none() -> None:
    assert [recipe(s).data.labelled.max_bad_rows for s in ({"jsonl": "a"}, {"parquet": "a"})] == [0, 0]
    assert [recipe(s).data.labelled.max_bad_rows for s in ({"hub": "a/b"}, {"dataset": "bbh"})] == [0.01, 0.01]


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"dataset": "aime_2052"}, "data.labelled: there is no data set 'aime_2052'; there are dapo_math_17k, "),
        ({"dataset": "bbh", "subset": "x"}, "data.labelled: bbh has no subset 'x'; it has boolean_expressions, "),
        ({"hub": "name"}, "data.labelled.hub: "),
        ({"hub": "a/b", "revison": "x"}, "data.labelled.revison is not an option (did you mean revision?)"),
        ({"parquet": "a", "promt": "x"}, "data.labelled.promt is not an option (did you mean prompt?)"),
        ({"jsonl": "a", "max_bad_rows": -1}, "data.labelled.max_bad_rows"),
        ({"jsonl": "a", "max_bad_rows": 1.5}, "data.labelled.max_bad_rows"),
        ({"jsonl": "a", "template": "no place"}, "data.labelled.template: a template needs {prompt} once"),
        ({"jsonl": "a", "template": "{prompt} \\boxed{{}}"}, "write \\boxed{} with single braces"),
        ({"generator": "sign", "count": 1}, "(or give jsonl: FILE, parquet: FILE, hub: ORG/NAME or dataset: NAME)"),
    ],
)
def test_mistakes_are_one_sentence_with_their_place(source: dict[str, Any], sentence: str) -> None:
    assert sentence in refusal(source)


def test_a_setting_replaces_a_source_by_one_of_another_kind() -> None:
    changed = recipe({"jsonl": "a", "extract": "whole"}, "data.labelled={dataset: aime_2024}").data.labelled
    assert changed == DatasetSource(dataset="aime_2024")


@pytest.mark.parametrize(
    ("source", "data", "style"),
    [
        ({"jsonl": "a"}, {}, Style()),
        (SIGNS, {}, Style()),
        ({"dataset": "aime_2025"}, {}, Style(chat="if_possible")),
        ({"dataset": "aime_2025", "chat": False}, {}, Style()),
        ({"dataset": "aime_2025"}, {"chat": False}, Style()),
        ({"jsonl": "a", "chat": True, "template": "{prompt}!"}, {}, Style(template="{prompt}!", chat="yes")),
        ({"jsonl": "a", "system": "Think."}, {}, Style(system="Think.", chat="yes")),
        (SIGNS, {"system": "Think."}, Style(system="Think.", chat="yes")),
        ({"jsonl": "a", "system": ""}, {"system": "Think."}, Style()),
        ({"jsonl": "a"}, {"enable_thinking": False}, Style(chat="yes", enable_thinking=False)),
        ({"jsonl": "a", "enable_thinking": True}, {"enable_thinking": False}, Style(chat="yes", enable_thinking=True)),
    ],
)
def test_a_source_is_asked_as_it_says_and_else_as_data_says(
    source: dict[str, Any], data: dict[str, Any], style: Style
) -> None:
    made = recipe(source, **data).data
    assert style_of(made, made.labelled) == style


def test_a_system_prompt_without_chat_is_refused() -> None:
    data = recipe({"jsonl": "a", "system": "Think.", "chat": False}).data
    with pytest.raises(UserError, match="chat is false"):
        style_of(data, data.labelled)


def test_a_cold_start_is_not_asked_in_chat() -> None:
    settings = ("cold_start.steps=5", "data.system=Think.")
    assert "set cold_start.steps to 0 or remove them" in refusal(SIGNS, *settings)


def test_a_benchmark_knows_where_its_answers_are() -> None:
    assert extractor(recipe({"dataset": "aime_2025"}).data.labelled) is boxed
    assert extractor(recipe({"dataset": "gpqa_diamond"}).data.labelled) is answer_line
    assert extractor(recipe({"dataset": "gpqa_diamond", "extract": "boxed"}).data.labelled) is boxed
    with pytest.raises(UserError, match="answers of zebralogic are for a verifier of kind grid"):
        extractor(recipe({"dataset": "zebralogic"}).data.labelled)


def test_a_benchmark_is_fetched_at_its_commit_and_asked_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a folder in the layout of the Hub library's cache, where nothing else is: there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TEMPO_HUB_OFFLINE", "1")
    commit = BENCHMARKS["aime_2025"].parts["all"].revision
    folder = tmp_path / "datasets--math-ai--aime25" / "snapshots" / str(commit)
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text('{"problem": "6 times 7?", "answer": "42", "id": "0"}\n')
    loaded = load_rows(recipe({"dataset": "aime_2025"}).data.labelled, "heldout", "data.evaluation.aime")
    assert loaded.questions == [shapes.boxed("problem", "answer")({"problem": "6 times 7?", "answer": "42"})]
    assert loaded.account()["files"][0]["commit"] == commit


def test_sets_have_the_names_of_the_recipe() -> None:
    data = recipe({"jsonl": "a"}, evaluation={"aime": {"dataset": "aime_2025"}}).data
    assert list(sources_of(data)) == ["labelled", "unlabelled", "evaluation.aime"]


def test_a_parquet_file_is_read_with_the_columns_of_the_recipe(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": f"{i} + 1?", "a": i + 1, "year": 2020 + i % 2} for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = {"parquet": str(tmp_path / "a.parquet"), "prompt": "q", "answer": "a", "filter": {"year": 2021}}
    loaded = load_rows(recipe(source).data.labelled, "labelled", "data.labelled")
    assert [(q.content, set(q.answers)) for q in loaded.questions] == [
        ("1 + 1?", {"2"}),
        ("3 + 1?", {"4"}),
        ("5 + 1?", {"6"}),
    ]
