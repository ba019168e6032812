"""Model cards, and exports to a Hub that only records what it is asked."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tempo_em import hub
from tempo_em.card import card
from tempo_em.commands import export_command
from tempo_em.report.runs import Run, Setting
from tempo_em.train import Training
from tempo_engine.errors import UserError

METRICS = {
    "val-core/unlabelled/acc/mean@4": 0.25,
    "val-aux/unlabelled/critic/auroc": 0.9,
    "val-aux/unlabelled/entropy": 1.0,
}


def a_run(**changes: Any) -> Run:
    rows = [(0, {"step": 3, **METRICS}), (5, {"step": 8, **dict.fromkeys(METRICS, 0.5)})]
    settings = [Setting("method", "tempo", "file"), Setting("seed", 7, "--set")]
    given: dict[str, Any] = {
        "folder": Path("run"), "settings": settings, "environment": {}, "iterations": [], "stages": [], "evaluations": rows,
        "base": None, "samples": [], "seconds": {}, "is_finished": True, "written": "",
    }  # fmt: skip
    return Run(**given | changes)


class Hub:
    """Says what huggingface_hub's HfApi says, of repositories that are `public`."""

    def __init__(self, *, public: bool = False, error: Exception | None = None) -> None:
        self.public, self.error = public, error
        self.calls: list[tuple[str, Any]] = []

    def create_repo(self, repository: str, **how: Any) -> str:
        if self.error:
            raise self.error
        self.calls.append((repository, how))
        return f"hub/{repository}"

    def repo_info(self, repository: str, **how: Any) -> Any:
        return SimpleNamespace(private=not self.public)

    def upload_folder(self, **how: Any) -> None:
        self.calls.append(("upload", how))


def test_a_card_says_what_the_models_are_worth_and_which_files_they_are() -> None:
    text = card(a_run(), 8, {"policy/model.safetensors": "ab12", "critic/model.safetensors": "cd34"})
    front = yaml.safe_load(text.split("---")[1])
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "text-generation")
    assert "after step 8 of the run, whose seed was 7" in text
    assert "| set | metric | start | after iteration 5 |" in text
    assert "| unlabelled | mean@4 | 0.250 | 0.500 |" in text
    assert "| unlabelled | AUROC | 0.900 | 0.500 |" in text
    assert "seed: 7  # --set" in text
    assert "| policy/model.safetensors | `ab12` |" in text


def test_a_card_of_an_earlier_step_claims_nothing_of_later_ones() -> None:
    text = card(a_run(), 5, {})
    assert "| set | metric | start |" in text
    assert "0.500" not in text
    assert "critic/" not in text
    assert "were not evaluated" in card(a_run(evaluations=[]), 5, {})


def test_a_card_tells_no_folders_of_the_machine_and_takes_no_markup() -> None:
    hostile = "x|<script>`[a](b)"
    settings = [
        Setting("method", hostile, "file"), Setting("model.path", "/home/me/models/Qwen", "file"),
        Setting("a", ["/home/me/b", "```"], "file"), Setting("checkpoint.every", 5, "file"),
    ]  # fmt: skip
    rows = [(0, {"step": 1, f"val-core/{hostile}/acc/mean@4": 0.5})]
    text = card(a_run(settings=settings, evaluations=rows), 3, {})
    assert "/home/me" not in text
    assert "model.path: Qwen" in text
    assert "checkpoint.every" not in text
    assert "<script>" not in text.split("## Recipe")[0]
    assert "````yaml" in text
    assert all(line.count("|") == 4 for line in text.splitlines() if line.startswith("| x"))


def test_an_export_has_a_card_with_the_hashes_of_its_files(train: Callable[..., Training], tmp_path: Path) -> None:
    training = train("em.iterations=1")
    assert export_command(training.run_dir, tmp_path / "out", None) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    for name in ("policy", "critic"):
        digest = hashlib.sha256((tmp_path / "out" / name / "model.safetensors").read_bytes()).hexdigest()
        assert f"| {name}/model.safetensors | `{digest}` |" in text
    assert "| unlabelled | mean@4 |" in text
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md")]
    assert not any(str(tmp_path).encode() in content for content in written)


def test_an_export_is_pushed_whole(
    started: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    api = Hub()
    monkeypatch.setattr(hub, "connect", lambda repository: api)
    assert export_command(started, tmp_path / "out", None, "me/model", True) == 0
    (repository, how), (_, upload) = api.calls
    assert (repository, how["private"], how["exist_ok"]) == ("me/model", True, True)
    assert (upload["repo_id"], upload["folder_path"], upload["repo_type"]) == ("me/model", tmp_path / "out", "model")
    assert "pushed to hub/me/model" in capsys.readouterr().out


def test_what_shall_be_private_is_not_pushed_to_a_public_repository(tmp_path: Path) -> None:
    api = Hub(public=True)
    with pytest.raises(UserError, match="is public"):
        hub.push(api, "me/model", tmp_path, private=True)
    assert [call for call, _ in api.calls] == ["me/model"]


@pytest.mark.parametrize("error", [RuntimeError("no route. More"), PermissionError("not yours")])
def test_a_hub_that_refuses_leaves_the_export_and_says_how_to_go_on(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hf upload me/model"):
        hub.push(Hub(error=error), "me/model", tmp_path, private=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no--good/x", False), "--push"),
        (("name", False), "USER/NAME"),
        (("me/x", False), "HF_HUB_OFFLINE"),
        ((None, True), "--push"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_exported(
    arguments: tuple[Any, bool], said: str, started: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export_command(started, tmp_path / "out", None, *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nobody_who_is_not_logged_in_gets_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise OSError("no token. Read more")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.HfApi, "whoami", refuse)
    with pytest.raises(UserError, match="hf auth login"):
        hub.connect("me/model")
