"""Reward functions of users, in TRL's and in verl's signature: what they are given, and what happens when they fail."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tempo_engine.errors import Halted, UserError
from tempo_engine.rollout import Labelled, Prompt, Rollout
from tempo_engine.tasks.answers import boxed
from tempo_engine.verify.functions import RewardFunction, find

Make = Callable[..., RewardFunction]

CODE = """
import asyncio, time
seen = {}

def trl(prompts, completions, completion_ids, trainer_state=1, **columns):
    seen.update(prompts=prompts, completions=completions, ids=completion_ids, state=trainer_state, columns=columns)
    return [float(c == a) for c, a in zip(completions, columns["answer"])]

async def trl_async(completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [0.5 * (c == a) for c, a in zip(completions, answer)]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    seen.setdefault("verl", []).append((data_source, solution_str, ground_truth, extra_info))
    return {"score": float(solution_str == ground_truth), "acc": 3}

async def verl_async(solution_str, ground_truth):
    await asyncio.sleep(0.05)
    return solution_str == ground_truth

def picky(completions, level): return [1.0] * len(completions)
def neither(text, answer): return 1.0
def both(completions, solution_str): return 1.0
def raises(completions, **kwargs):
    if "boom" in completions: raise ValueError("went boom. And more")
    return [1.0] * len(completions)
def raises_verl(solution_str, ground_truth): raise KeyError("k")
def slow(completions): time.sleep(30)
def hangs_async(completions): return asyncio.sleep(30)
def exits(completions): raise SystemExit(0)
def short(completions): return [1.0]
def gives(completions, value, **kwargs): return [meant(v) for v in value]
def meant(v): return {"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1", "list": [1]}.get(v, v)
NOT_A_FUNCTION = 3
"""


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n", encoding="utf-8")
    (tmp_path / "needy_rewards.py").write_text("import no_such_thing\n", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("my_rewards", None)


def made(name: str, seconds: float = 20.0) -> RewardFunction:
    return RewardFunction(f"my_rewards:{name}", boxed, prompt_column="prompt", answer_column="answer", seconds=seconds)


def rows(*columns: dict[str, Any]) -> list[Labelled]:
    return [Labelled(Prompt(f"q{i}", f"text {i}", (5,)), frozenset(), row) for i, row in enumerate(columns)]


def said(items: list[Labelled], *texts: str) -> list[Rollout]:
    return [Rollout(i.prompt, [2, 1], [-1.0] * 2, ((0, 2),), False, t) for i, t in zip(items, texts, strict=True)]


def seen() -> dict[str, Any]:
    return sys.modules["my_rewards"].seen


# --- What they are given -----------------------------------------------------------------------------------------------------


def test_trl_gets_lists_and_the_columns_of_the_rows():
    items = rows({"prompt": "2+2", "answer": "4", "level": 1}, {"prompt": "3+3", "answer": "6"})
    function = made("trl")
    assert function.note == "reward function my_rewards:trl: called as in TRL"
    assert function.rewards(said(items, "4", "5"), items) == [1.0, 0.0]
    assert seen() == {
        "prompts": ["2+2", "3+3"],
        "completions": ["4", "5"],
        "ids": [[2, 1], [2, 1]],
        "state": None,
        "columns": {"answer": ["4", "6"], "level": [1, None]},
    }


def test_trl_gets_messages_where_the_prompt_is_a_chat():
    chat = [{"role": "user", "content": "2+2"}]
    items = rows({"prompt": chat, "answer": "4"})
    made("trl").rewards(said(items, "4"), items)
    assert seen()["prompts"] == [chat]
    assert seen()["completions"] == [[{"role": "assistant", "content": "4"}]]


def test_verl_gets_one_solution_at_a_time():
    whole = {"prompt": "p", "data_source": "math", "reward_model": {"ground_truth": "4"}, "extra_info": {"index": 3}}
    plain = {"prompt": "p", "answer": "6"}
    items = rows(whole, plain)
    function = made("verl")
    assert function.note.endswith("called as in verl")
    assert function.rewards(said(items, "4", "5"), items) == [1.0, 0.0]
    assert seen()["verl"] == [("math", "4", "4", {"index": 3}), ("", "5", "6", plain)]


@pytest.mark.parametrize(("name", "right"), [("trl_async", 0.5), ("verl_async", 1.0)])
def test_functions_may_be_async(name: str, right: float):
    items = rows({"prompt": "p", "answer": "4"}, {"prompt": "p", "answer": "4"})
    assert made(name).rewards(said(items, "4", "5"), items) == [right, 0.0]


def test_votes_are_read_as_extract_says():
    assert made("trl").extract(r"\boxed{7}") == "7"
    assert made("trl").rewards([], []) == []


# --- Mistakes that are found before a run ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("my_rewards", "wants module:function"),
        ("my_rewards.py:trl", "wants module:function"),
        ("folder/my_rewards:trl", "wants module:function"),
        ("my_rewards:", "wants module:function"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("needy_rewards:f", "there is no module no_such_thing"),
        ("my_rewards:nothing", "has no nothing"),
        ("my_rewards:NOT_A_FUNCTION", "is a int, want a function"),
        ("broken_rewards:f", "importing broken_rewards fails: ZeroDivisionError"),
    ],
)
def test_what_cannot_be_imported_is_said(where: str, says: str):
    with pytest.raises(UserError, match=says):
        find(where)


@pytest.mark.parametrize("name", ["neither", "both"])
def test_a_signature_that_is_neither_is_refused_with_both(name: str):
    with pytest.raises(UserError, match=r"prompts, completions.*as in TRL, or \(data_source.*as in verl"):
        made(name)


def test_a_column_that_the_data_lacks_is_named():
    made("picky").check_columns(["prompt", "level"], "a.jsonl")
    made("trl").check_columns(["prompt"], "a.jsonl")
    made("verl").check_columns([], "a.jsonl")
    function, items = made("picky"), rows({"prompt": "a"})
    function.check_columns(["prompt", "level"], "a.jsonl")
    assert function.rewards(said(items, "x"), items) == [1.0], "of rows that all lack a column it is None, not missing"
    with pytest.raises(UserError, match=r"wants 'level'; a.jsonl gives .*prompt"):
        made("picky").check_columns(["prompt"], "a.jsonl")


# --- Failures during a run ---------------------------------------------------------------------------------------------------


def test_an_exception_stops_the_run_with_function_and_row():
    items = rows({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    with pytest.raises(
        Halted, match=r"my_rewards:raises raised ValueError: went boom on the question 'text 1' \(id q1\)"
    ):
        made("raises").rewards(said(items, "x", "boom", "y"), items)
    with pytest.raises(Halted, match="raised KeyError: 'k' on the question 'text 0'"):
        made("raises_verl").rewards(said(items[:1], "x"), items[:1])
    with pytest.raises(Halted, match="raised SystemExit"):
        made("exits").rewards(said(items[:1], "x"), items[:1])


@pytest.mark.parametrize("name", ["slow", "hangs_async"])
def test_a_function_that_takes_too_long_stops_the_run(name: str):
    items = rows({"prompt": "a"}, {"prompt": "b"})
    start = time.monotonic()
    with pytest.raises(Halted, match=r"took more than 0.2 s on a batch that begins with .*raise timeout_s"):
        made(name, seconds=0.2).rewards(said(items, "x", "y"), items)
    assert time.monotonic() - start < 10, "it is not waited for"


def test_a_list_of_another_length_is_refused():
    items = rows({"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(Halted, match="returned 1 rewards for 2 completions"):
        made("short").rewards(said(items, "x", "y"), items)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("none", "gave None, no reward, for the question 'text 1'"),
        ("nan", "gave nan for"),
        ("inf", "gave inf for .* from 0 to 1"),
        ("text", "gave '1' for .*want a float"),
        ("list", "gave a list for .*want a float"),
        (1.5, "gave 1.5 for .* from 0 to 1"),
        (-0.1, "gave -0.1 for .* from 0 to 1"),
    ],
)
def test_what_is_no_reward_is_refused_with_its_row(value: object, says: str):
    items = rows({"prompt": "a", "value": 1}, {"prompt": "b", "value": value})
    with pytest.raises(Halted, match=says):
        made("gives").rewards(said(items, "x", "y"), items)


def test_numbers_of_any_type_are_rewards():
    items = rows({"prompt": "a", "value": True}, {"prompt": "b", "value": 0}, {"prompt": "c", "value": 0.25})
    rewards = made("gives").rewards(said(items, "x", "y", "z"), items)
    assert rewards == [1.0, 0.0, 0.25]
    assert all(type(reward) is float and math.isfinite(reward) for reward in rewards)
