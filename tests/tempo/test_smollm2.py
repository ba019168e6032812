"""The recipe smollm2-135m with a small model in the big one's place: worked questions before each, one line a response."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tempo_em.build import build
from tempo_em.commands import import_command
from tempo_em.console import PlainDisplay
from tempo_em.datasets import load_datasets
from tempo_em.loading import load_recipe
from tempo_em.recipe import Recipe
from tempo_em.train import Training
from tempo_engine.model import Policy
from tempo_engine.tokenizer import byte_tokenizer

SMALLER = (
    "threads=1", "micro_batch_tokens=4096", "data.labelled.count=8", "data.unlabelled.count=4", "data.evaluation.heldout.count=4",
    "rollout.max_prompt_tokens=256", "em.iterations=1", "em.rollouts=16", "initialisation.critic_warmup=1", "evaluation.samples=2",
)  # fmt: skip


@pytest.fixture
def model(make_policy: Callable[..., Policy], tmp_path: Path) -> Path:
    """A directory with a model of bytes that nobody trained."""
    tokenizer = byte_tokenizer()
    policy = make_policy(vocab_size=len(tokenizer), max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id)
    policy.model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_it_runs_from_its_first_to_its_last_iteration(model: Path, tmp_path: Path) -> None:
    Training(
        load_recipe("smollm2-135m", [f"model.path={model}", *SMALLER]), tmp_path / "run", PlainDisplay(), resume=False
    ).run()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"unlabelled", "heldout"} == set(summary["stages"]["final"])
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].count("Answer: ") == 3
    assert sample["prompt"].endswith(" =\n")


def test_a_response_ends_at_the_end_of_its_line(model: Path) -> None:
    settings = [f"model.path={model}", *SMALLER, "rollout.max_new_tokens=200"]
    loop = build(load_recipe("smollm2-135m", settings).recipe).loop
    newline = byte_tokenizer()("\n")["input_ids"]
    loop.sampler.load(loop.policy)
    rollouts = loop.sampler.sample([loop.unlabelled.items[0]], 64, key="k")
    ended = [r for r in rollouts if r.response_ids[-1:] == newline]
    assert ended, "none of 64 random responses of 200 bytes holds a newline"
    for rollout in rollouts:
        assert rollout.is_truncated or rollout.response_ids[-1] in (newline[0], byte_tokenizer().eos_token_id)
        assert newline[0] not in rollout.response_ids[:-1]
        assert "\n" not in rollout.text


def test_its_questions_have_one_answer_each_and_are_in_one_set_each() -> None:
    recipe: Recipe = load_recipe("smollm2-135m", []).recipe
    questions = [q for dataset in load_datasets(recipe).values() for q in dataset.questions]
    assert {len(q.answers) for q in questions} == {1}
    assert len({q.id for q in questions}) == len(questions)
    assert len({q.shown.removesuffix(f"{q.content}\n") for q in questions}) == 1, "all begin alike"


def test_a_file_that_cannot_be_imported_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert import_command(str(tmp_path / "none.gguf"), tmp_path / "to") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())
