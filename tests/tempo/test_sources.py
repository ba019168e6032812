"""Sources of rows in a recipe: one line each, their settings, how their questions are asked and who says what is right."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tempo_em.loading import parse_setting, resolve
from tempo_em.recipe_data import DatasetSource, HubSource, JsonlSource, ParquetSource
from tempo_em.sources import load_rows, sources_of, style_of
from tempo_engine.data import shapes
from tempo_engine.data.benchmarks import BENCHMARKS
from tempo_engine.data.load import Loaded
from tempo_engine.data.style import Style
from tempo_engine.errors import UserError
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.tasks.question import Split
from tempo_engine.verify import Verifier
from tempo_engine.verify.judge import Judge
from tempo_engine.verify.pool import Pool

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
        (
            {"dataset": "dolci_rl_zero_general"},
            "data.labelled: dolci_rl_zero_general has free answers, which a language",
        ),
        ({"dataset": "aime_2025", "verifier": "itn"}, "data.labelled.verifier.type: "),
        ({"hub": "a/b", "filter": {"zebra": [[1]]}}, "data.labelled.filter.zebra"),
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


def loaded_from(source: dict[str, Any], split: Split = "labelled") -> tuple[Loaded, Verifier]:
    return load_rows(recipe(source).data.labelled, split, "data.labelled", Pool(1))


def rewards(source: dict[str, Any], *texts: str) -> list[float]:
    """Of responses to the source's first question."""
    loaded, verifier = loaded_from(source)
    question = loaded.questions[0]
    prompt = Prompt(question.id, question.shown or str(question.content), (5,))
    item = Labelled(prompt, question.answers, question.columns)
    try:
        return verifier.rewards(
            [Rollout(prompt, [2], [-1.0], ((0, 1),), False, text) for text in texts], [item] * len(texts)
        )
    finally:
        verifier.close()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """cached(name, row): a row of a benchmark in the layout of the Hub library's cache, where nothing else is: no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TEMPO_HUB_OFFLINE", "1")

    def put(name: str, row: dict[str, Any], subset: str = "all") -> str:
        place = BENCHMARKS[name].parts[subset]
        folder = tmp_path / f"datasets--{place.hub.replace('/', '--')}" / "snapshots" / str(place.revision)
        folder.mkdir(parents=True)
        (folder / f"{place.config or ''}-{place.split}.jsonl").write_text(json.dumps(row) + "\n")
        return str(place.revision)

    return put


def test_a_benchmark_is_fetched_at_its_commit_and_asked_in_its_words(cached: Callable[..., str]) -> None:
    row = {"problem": "6 times 7?", "answer": "42", "id": "0"}
    commit = cached("aime_2025", row)
    loaded, _ = loaded_from({"dataset": "aime_2025"}, "heldout")
    assert loaded.questions == [shapes.boxed("problem", "answer")(row)]
    assert loaded.account()["files"][0]["commit"] == commit


GPQA = {"Question": "Which is a fruit?", "Correct Answer": "pear", "Incorrect Answer 1": "stone", "Incorrect Answer 2": "rope",
        "Incorrect Answer 3": "salt"}  # fmt: skip
GRID = {"puzzle": "There is 1 house.", "solution": {"header": ["House", "Name"], "rows": [["1", "Ann"]]}}


@pytest.mark.parametrize(
    ("name", "row", "right", "wrong"),
    [
        ("aime_2025", {"problem": "6 times 7?", "answer": "042"}, r"So \boxed{42}.", r"\boxed{42 m}"),
        ("gpqa_diamond", GPQA, "It grows.\nANSWER: (d) pear", "ANSWER: A"),
        ("zebralogic", GRID, 'So {"reasoning": "", "solution": {"House 1": {"Name": "ann "}}}', '{"House 1": {"Name": "Bob"}}'),
        ("olymmath", {"problem": "1 / 2?", "answer": r"\frac{1}{2}"}, r"\boxed{0.5}", r"\boxed{0.25}"),
        ("bbh", {"question": "Is it so?", "target": "Yes"}, "ANSWER: yes.", "ANSWER: no"),
    ],
)  # fmt: skip
def test_answers_of_a_benchmark_are_compared_as_its_kind_of_answer(
    cached: Callable[..., str], name: str, row: dict[str, Any], right: str, wrong: str
) -> None:
    subset = next(iter(BENCHMARKS[name].parts))
    cached(name, row, subset)
    source = {"dataset": name} | ({} if subset == "all" else {"subset": subset})
    assert rewards(source, right, wrong) == [1.0, 0.0]


def test_a_recipe_may_say_otherwise_than_the_benchmark(cached: Callable[..., str]) -> None:
    cached("gpqa_diamond", GPQA)
    source = {"dataset": "gpqa_diamond", "extract": "boxed"}
    assert rewards(source, r"\boxed{D}", "ANSWER: D") == [1.0, 0.0]
    assert rewards(source | {"verifier": "exact"}, r"\boxed{(d)}", r"\boxed{**D**}") == [1.0, 0.0]


def test_a_benchmark_s_answers_of_another_kind_than_the_recipe_says_are_bad_rows(cached: Callable[..., str]) -> None:
    cached("gpqa_diamond", GPQA)
    with pytest.raises(UserError, match="the answer must be an integer, else no response could match it"):
        loaded_from({"dataset": "gpqa_diamond", "verifier": "int"})


JUDGE = {"judge": {"url": "http://127.0.0.1:1/v1", "model": "m"}}


def asked_of_the_judge(source: dict[str, Any]) -> str:
    loaded, verifier = loaded_from(source)
    assert isinstance(verifier, Judge)
    item = Labelled(Prompt("id", "<|user|>", (5,)), frozenset(), loaded.questions[0].columns)
    return verifier.messages("it is so", item)[1]["content"]


def test_a_judge_of_a_benchmark_sees_what_was_asked_and_the_reference(cached: Callable[..., str]) -> None:
    cached("dolci_rl_zero_general", {"prompt": "user: Name a colour.", "ground_truth": ["Blue."]})
    asked = asked_of_the_judge({"dataset": "dolci_rl_zero_general", "verifier": JUDGE})
    assert "Question:\nName a colour.\n\nRight answer: Blue.\n" in asked


def test_a_judge_of_verl_s_rows_sees_their_answer(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "Name a colour."}], "reward_model": {"ground_truth": "Blue."}}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    asked = asked_of_the_judge({"jsonl": str(tmp_path / "a.jsonl"), "verifier": JUDGE})
    assert "Question:\nName a colour.\n\nRight answer: Blue.\n" in asked


def test_a_function_gets_a_benchmark_s_row_with_what_was_asked(
    cached: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached("gpqa_diamond", GPQA | {"Subdomain": "botany"})
    code = (
        "seen = []\n"
        "def score(prompts, completions, answer, Subdomain):\n"
        "    seen.append((prompts, answer, Subdomain))\n"
        "    return [0.5]\n"
    )
    (tmp_path / "its_rewards.py").write_text(code)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert rewards({"dataset": "gpqa_diamond", "verifier": {"function": "its_rewards:score"}}, "D") == [0.5]
    ((prompts, answer, subdomain),) = sys.modules.pop("its_rewards").seen
    assert "A) stone\nB) rope\nC) salt\nD) pear" in prompts[0]
    assert (answer, subdomain) == (["D"], ["botany"])


def test_a_function_that_wants_a_column_that_no_row_has_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wanting.py").write_text("def score(completions, level):\n    return [1.0]\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "q"}\n')
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    source = {"jsonl": str(tmp_path / "a.jsonl"), "verifier": {"function": "wanting:score"}}
    with pytest.raises(UserError, match=r"wants 'level'; data\.labelled gives"):
        loaded_from(source)
    sys.modules.pop("wanting")


def test_sets_have_the_names_of_the_recipe() -> None:
    data = recipe({"jsonl": "a"}, evaluation={"aime": {"dataset": "aime_2025"}}).data
    assert list(sources_of(data)) == ["labelled", "unlabelled", "evaluation.aime"]


def test_a_parquet_file_is_read_with_the_columns_of_the_recipe(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": f"{i} + 1?", "a": i + 1, "year": 2020 + i % 2} for i in range(6)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    source = {"parquet": str(tmp_path / "a.parquet"), "prompt": "q", "answer": "a", "filter": {"year": 2021}}
    loaded, _ = loaded_from(source)
    assert [(q.content, set(q.answers)) for q in loaded.questions] == [
        ("1 + 1?", {"2"}),
        ("3 + 1?", {"4"}),
        ("5 + 1?", {"6"}),
    ]
