"""The Hub without a network: a folder in the layout of its library's cache, and a stand-in where files are listed."""

from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from tempo_engine.data import hub
from tempo_engine.data.hub import Where, choose_files, fetch, glob_of
from tempo_engine.data.load import Reading, load
from tempo_engine.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: mit\nconfigs:\n- config_name: en\n  data_files:\n  - split: test\n    path: data/*-EN.jsonl\n---\n# Title\n"
Cache = Callable[..., Path]


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """cached({"data/a.jsonl": "..."}): these files of org/name at COMMIT, which is its main branch, without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(hub.OFFLINE, raising=False)

    def make(files: dict[str, str]) -> Path:
        folder = tmp_path / "datasets--org--name"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text(COMMIT)
        for name, text in files.items():
            file = folder / "snapshots" / COMMIT / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return folder

    return make


def test_the_files_that_a_card_names_are_found_and_the_commit_is_known(cached: Cache) -> None:
    cached({"README.md": CARD, "data/X-EN.jsonl": "{}", "data/X-ZH.jsonl": "{}"})
    for revision in (None, "main", COMMIT):
        snapshot = fetch(Where(hub="org/name", revision=revision, config="en", split="test"))
        assert snapshot.commit == COMMIT
        assert list(snapshot.files) == ["data/X-EN.jsonl"]
        assert snapshot.files["data/X-EN.jsonl"].is_file()


def test_questions_are_read_and_the_account_names_commit_and_hash(cached: Cache) -> None:
    cached({"data/test.jsonl": '{"problem": "1 + 1?", "answer": 2}\nno\n', "data/train.jsonl": ""})
    where = Where(hub="org/name", split="test")
    loaded = load([where], Reading(max_bad_rows=1), "heldout", "data.x")
    assert [question.content for question in loaded.questions] == ["1 + 1?"]
    account = loaded.account()["files"][0]
    assert (account["hub"], account["commit"], account["path"]) == ("org/name", COMMIT, "data/test.jsonl")
    assert loaded.sentence().startswith("data.x: 1 questions of org/name@01234567 (prompt = problem, answer = answer)")
    assert loaded.intake.quarantine[0].file == "org/name/data/test.jsonl"


def test_what_is_not_there_without_a_network_is_one_sentence(cached: Cache) -> None:
    cached({})
    with pytest.raises(UserError, match=r"the data set org/other could not be fetched: .*HF_TOKEN"):
        fetch(Where(hub="org/other"))
    with pytest.raises(UserError, match=f"the data set org/name at {'f' * 40} could not be fetched"):
        fetch(Where(hub="org/name", revision="f" * 40))


def test_with_a_network_files_are_listed_and_only_the_chosen_ones_downloaded(
    cached: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cached({"README.md": CARD, "data/A[1]-EN.jsonl": "{}"}) / "snapshots" / COMMIT
    asked = []

    def download(repo: str, **options: object) -> str:
        asked.append((options["revision"], options["allow_patterns"], options["local_files_only"]))
        return str(folder)

    def listed(self: object, repo: str, **options: object) -> list[str]:
        return ["README.md", "script.py", "data/A[1]-EN.jsonl", "data/A-ZH.jsonl"]

    monkeypatch.setenv(hub.OFFLINE, "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    assert list(fetch(Where(hub="org/name", revision="main", config="en", split="test")).files) == [
        "data/A[1]-EN.jsonl"
    ]
    assert asked == [("main", ["README.md"], False), (COMMIT, ["data/A[[]1]-EN.jsonl"], False)]
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # as it was before


def test_a_hub_that_is_down_leaves_what_is_in_the_cache(cached: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached({"data/test.jsonl": "{}"}) / "snapshots" / COMMIT

    def down(self: object, repo: str, **options: object) -> list[str]:
        raise ConnectionError("no route to host")

    monkeypatch.setenv(hub.OFFLINE, "0")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **options: str(folder))
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", down)
    assert list(fetch(Where(hub="org/name", split="test")).files) == ["data/test.jsonl"]
    (folder / "data" / "test.jsonl").unlink()
    with pytest.raises(UserError, match="could not be fetched: no route to host"):
        fetch(Where(hub="org/name", split="test"))


FILES = [
    "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/test-00000-of-00001.parquet",
    "grid_mode/test-00000-of-00001.parquet", "mc_mode/test-00000-of-00001.parquet", "gpqa_diamond.csv", "gpqa_main.csv",
    "load.py", "README.md",
]  # fmt: skip


@pytest.mark.parametrize(
    ("config", "split", "chosen"),
    [
        (None, "train", FILES[:2]),
        ("grid_mode", "test", [FILES[3]]),
        ("gpqa_diamond", "train", ["gpqa_diamond.csv"]),
    ],
)
def test_without_a_card_paths_say_config_and_split(config: str | None, split: str, chosen: list[str]) -> None:
    assert choose_files("org/name", FILES, {}, config, split) == chosen


@pytest.mark.parametrize(
    ("data_files", "chosen"),
    [
        ("gpqa_main.csv", ["gpqa_main.csv"]),
        (["gpqa_main.csv", "gpqa_diamond.csv"], ["gpqa_diamond.csv", "gpqa_main.csv"]),
        ({"train": "data/train-*", "test": "data/test-*"}, FILES[:2]),
        ([{"split": "train", "path": ["data/train-*"]}, {"split": "test", "path": "data/test-*"}], FILES[:2]),
        ([{"split": "train", "path": "**/train-*"}], FILES[:2]),
    ],
)
def test_a_card_names_files_in_any_of_its_forms(data_files: object, chosen: list[str]) -> None:
    card = {"configs": [{"config_name": "default", "data_files": data_files}]}
    assert choose_files("org/name", FILES, card, None, "train") == chosen


def test_patterns_of_the_recipe_win() -> None:
    card = {"configs": [{"config_name": "default", "data_files": "gpqa_main.csv"}]}
    assert choose_files("org/name", FILES, card, None, "train", ["grid*"]) == ["grid_mode/test-00000-of-00001.parquet"]


def test_a_split_that_is_not_there_is_answered_with_the_files() -> None:
    with pytest.raises(
        UserError, match=r"org/name has no config default, split dev; its readable files are data/test-0"
    ):
        choose_files("org/name", FILES, {}, None, "dev")
    with pytest.raises(UserError, match=r"has no files \*\.txt; its readable files are none"):
        choose_files("org/name", ["load.py"], {}, None, "train", ["*.txt"])


def test_scripts_are_never_chosen() -> None:
    with pytest.raises(UserError, match="its readable files are none"):
        choose_files("org/name", ["load.py", "train.py"], {}, None, "train")


def test_a_broken_card_is_no_card(cached: Cache) -> None:
    cached({"README.md": "---\nconfigs: [a: b: c\n---\n", "train.jsonl": "{}"})
    assert list(fetch(Where(hub="org/name")).files) == ["train.jsonl"]


def test_a_name_with_brackets_is_a_pattern_for_itself_only() -> None:
    assert glob_of("a[1]*?.csv") == "a[[]1][*][?].csv"
