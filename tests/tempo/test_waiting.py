import json
from pathlib import Path

import pytest
from tempo_em.waiting import Sampled, Waiting
from tempo_engine.rollout import Prompt, Rollout

ROLLOUT = Rollout(Prompt("p", "3 5 = (8)", (5, 9)), [7, 2], [-0.1, -1.0 / 3.0], ((3, 1), (4, 2)), False, "+3+5")
SAMPLED = Sampled([ROLLOUT], [1.0], 0.5, [ROLLOUT, ROLLOUT], 3, 6, {"labelled": 8, "unlabelled": 2})


def kept(path: Path) -> Waiting:
    Waiting(path).keep("em/3", 4, lambda: SAMPLED)
    waiting = Waiting(path)
    waiting.find()
    return waiting


def test_rollouts_come_back_to_the_last_bit(tmp_path: Path) -> None:
    assert kept(tmp_path / "rollouts.json").take("em/3", 4) == SAMPLED


def test_they_are_taken_once(tmp_path: Path) -> None:
    waiting = kept(tmp_path / "rollouts.json")
    waiting.take("em/3", 4)
    assert waiting.take("em/3", 4) is None


@pytest.mark.parametrize(("key", "version"), [("em/4", 4), ("em/3", 5)])
def test_those_of_another_occasion_or_other_weights_are_not_taken(tmp_path: Path, key: str, version: int) -> None:
    assert kept(tmp_path / "rollouts.json").take(key, version) is None


def test_without_a_resume_nothing_is_taken(tmp_path: Path) -> None:
    kept(tmp_path / "rollouts.json")
    assert Waiting(tmp_path / "rollouts.json").take("em/3", 4) is None


@pytest.mark.parametrize("damage", ["", "no hash", "\xff", '{"key": "em/3"}'])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rollouts.json"
    path.write_bytes(damage.encode("latin-1"))
    waiting = Waiting(path)
    waiting.find()
    assert waiting.take("em/3", 4) is None


def test_a_changed_token_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.json"
    kept(path)
    path.write_text(path.read_text().replace("[7, 2]", "[7, 3]"))
    waiting = Waiting(path)
    waiting.find()
    assert waiting.take("em/3", 4) is None
    assert json.loads(path.read_text().split("\n")[1])["key"] == "em/3"
