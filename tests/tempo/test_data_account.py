"""What a run's folder says of its data, and that a run does not go on with other data than it began with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tempo_em.console import PlainDisplay
from tempo_em.data_account import account, changes, check_unchanged, write_account
from tempo_em.datasets import load_datasets
from tempo_em.loading import load_recipe, packaged
from tempo_em.train import Training
from tempo_engine.errors import UserError

SHORT = ("em.iterations=1", "em.rollouts=16", "evaluation.every=0", "evaluation.samples=2", "checkpoint.every=0",
         "checkpoint.export=false", "initialisation.critic_warmup=1")  # fmt: skip
Begin = Callable[..., Training]


def rows(numbers: range, **more: Any) -> str:
    return "".join(json.dumps({"question": f"{n} + 1 =", "gold": n + 1, **more}) + "\n" for n in numbers)


@pytest.fixture
def begin(tmp_path: Path) -> Begin:
    """begin(): a run of a tiny model on two files, one of which has a repeat, a broken row and a prompt that is too long."""
    (tmp_path / "labelled.jsonl").write_text(
        rows(range(8)) + rows(range(2)) + "oops\n" + rows(range(10**20, 10**20 + 1))
    )
    (tmp_path / "unlabelled.jsonl").write_text(rows(range(8, 12)))
    column = {"prompt": "question", "answer": "gold", "extract": "answer_line"}
    tiny = yaml.safe_load(packaged("recipes")["tiny"])
    tiny |= {"cold_start": {}, "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 8}}
    tiny["data"] = {
        "labelled": {"jsonl": "labelled.jsonl", "max_bad_rows": 2, **column},
        "unlabelled": {"jsonl": "unlabelled.jsonl", **column},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny))

    def make(*settings: str, resume: bool = False) -> Training:
        resolved = load_recipe(str(tmp_path / "recipe.yaml"), [*SHORT, *settings])
        return Training(resolved, tmp_path / "run", PlainDisplay(), resume=resume)

    return make


def test_a_run_keeps_an_account_of_its_data_and_refuses_other_data_later(
    begin: Begin, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin().run()
    said = capsys.readouterr().out
    assert f"data.labelled: 8 questions of {tmp_path / 'labelled.jsonl'} (prompt = question, answer = gold)" in said
    assert "left out: 2 repeats, 2 bad" in said
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert list(kept) == ["labelled", "unlabelled"]
    assert kept["labelled"]["rows"] == 12
    assert kept["labelled"]["questions"] == 8
    assert kept["labelled"]["left_out"] == {"repeats": 2, "bad": 2}
    assert len(kept["labelled"]["files"][0]["sha256"]) == 64
    quarantine = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["set"], row["row"]) for row in quarantine] == [("data.labelled", 11), ("data.labelled", 12)]
    assert quarantine[0]["reason"].startswith("is not JSON")
    assert quarantine[1]["reason"].startswith("the prompt has 27 tokens, the limit rollout.max_prompt_tokens is 16")

    file = tmp_path / "unlabelled.jsonl"
    before = file.read_text()
    file.write_text(rows(range(9, 13)))
    with pytest.raises(
        UserError, match=r"data\.unlabelled: the data file .*unlabelled\.jsonl is not what it was when .*run began"
    ):
        begin(resume=True)
    file.write_text(before)
    begin(resume=True).lock.release()


def test_one_bad_row_too_many_ends_before_there_is_a_run(begin: Begin, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.labelled has 2 bad rows, max_bad_rows is 1; .*line 12: the prompt has 27 tokens"
    ):
        begin("data.labelled.max_bad_rows=1")
    assert not (tmp_path / "run").exists()


def test_generated_questions_are_in_the_account_by_their_content(tmp_path: Path) -> None:
    one, other = (load_datasets(load_recipe("tiny", [f"seed={seed}"]).recipe) for seed in (1, 2))
    write_account(one, tmp_path)
    assert json.loads((tmp_path / "data.json").read_text()) == account(one)
    assert account(one)["labelled"]["questions"] == len(one["labelled"].questions)
    assert account(one)["labelled"]["content"] != account(other)["labelled"]["content"]
    assert [file.name for file in tmp_path.iterdir()] == ["data.json"]


def of_hub(hub: str, sha256: str) -> dict[str, str]:
    return {"path": "data/test.parquet", "hub": hub, "commit": "c" * 40, "sha256": sha256 * 64}


def test_files_of_two_data_sets_with_one_name_are_two_files() -> None:
    before = [of_hub("a/x", "1"), of_hub("a/y", "2")]
    assert list(changes(before, before)) == []
    now = [of_hub("a/x", "3"), of_hub("a/y", "2")]
    version = "of commit " + "c" * 40
    assert list(changes(before, now)) == [
        ("a/x/data/test.parquet", f"sha256 {'1' * 12} {version}", f"sha256 {'3' * 12} {version}")
    ]
    assert list(changes(before, before[:1])) == [("a/y/data/test.parquet", f"sha256 {'2' * 12} {version}", "not there")]


def test_a_folder_of_before_there_were_accounts_is_gone_on_with(tmp_path: Path) -> None:
    check_unchanged(load_datasets(load_recipe("tiny", []).recipe), tmp_path)
