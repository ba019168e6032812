"""Reading and refusing: results written by hand, so that every number can be checked."""

import json
from pathlib import Path
from typing import Any

import pytest
from tempo_em.compare.cells import Cell
from tempo_em.compare.report import tables
from tempo_em.compare.results import interval, read_results
from tempo_em.compare.spec import Comparison
from tempo_engine.errors import UserError

COMPARISON = Comparison.model_validate(
    {
        "title": "two arms",
        "iterations": 2,
        "arms": {"tempo": {"method": "tempo"}, "ttrl": {"method": "ttrl"}},
        "tasks": {"signs": {"recipe": "tiny", "bases": [0], "seeds": [0, 1]}},
    }
)


def write_cell(
    out: Path,
    seed: int,
    arm: str,
    accuracies: list[float],
    *,
    start: float = 0.2,
    tokens: int = 100,
    responses: int = 8,
    alarms: tuple[int, ...] = (),
) -> None:
    """A cell's metrics.jsonl; the start is among the evaluations of the first arm only. One iteration before each evaluation."""

    def evaluation(label: str, value: float) -> dict[str, Any]:
        critic = {"auroc": None, "brier": 0.25}
        row = {f"val-aux/unlabelled/critic/{name}": metric for name, metric in critic.items()}
        return {"evaluation": label, "val-core/unlabelled/acc/mean@4": value} | (row if arm == "tempo" else {})

    rows: list[dict[str, Any]] = [evaluation("start", start)] if arm == "tempo" else []
    for i, value in enumerate(accuracies, start=1):
        work = {"rollout/responses": responses, "tokens/generated": tokens, "timing_s/step": 1.5}
        rows += [{"stage": "em", "iteration": i, "alarm/auroc": 0.0, "alarm/promise": float(i in alarms), **work}]
        rows += [evaluation("final" if i == len(accuracies) else f"em/{i}", value)]
    folder = out / Cell("signs", 0, arm, seed).name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_last_and_best_are_those_up_to_the_tables_iteration(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_cell(tmp_path, seed, "tempo", [0.5, 0.4, 0.9])  # went on for a third iteration
        write_cell(tmp_path, seed, "ttrl", [0.3, 0.1])
    results = read_results(COMPARISON, tmp_path)
    tempo, ttrl = results[Cell("signs", 0, "tempo", 0)], results[Cell("signs", 0, "ttrl", 0)]
    assert tempo.last == {"unlabelled/mean@4": 0.4, "unlabelled/critic/brier": 0.25}
    assert tempo.best["unlabelled/mean@4"] == 0.5
    assert ttrl.start == tempo.start
    assert (tempo.work.responses, tempo.work.tokens, tempo.work.seconds) == (16, 200, 3.0)
    assert tables(COMPARISON, results).splitlines()[2:7] == [
        "|  | against tempo | unlabelled mean@4 | unlabelled mean@4, best |",
        "| --- | --- | --- | --- |",
        "| start |  | 0.200 [0.200, 0.200] |  |",
        "| tempo |  | 0.400 [0.400, 0.400] | 0.500 [0.500, 0.500] |",
        "| ttrl | -0.300 [-0.300, -0.300] | 0.100 [0.100, 0.100] | 0.300 [0.300, 0.300] |",
    ]
    critic = [line.split(" | ") for line in tables(COMPARISON, results).splitlines()[10:13]]
    assert [(row[0], row[2], row[-3:]) for row in critic] == [
        ("| start", "0.250 [0.250, 0.250]", ["", "", " |"]),
        ("| tempo", "0.250 [0.250, 0.250]", ["16", "0k", "3 |"]),
        ("| ttrl", "", ["16", "0k", "3 |"]),
    ]


def test_the_first_alarm_up_to_the_tables_iteration_stands_beside_the_critic(tmp_path: Path) -> None:
    for seed, alarms in ((0, (2, 3)), (1, (3,))):
        write_cell(tmp_path, seed, "tempo", [0.5, 0.4, 0.9], alarms=alarms)
        write_cell(tmp_path, seed, "ttrl", [0.3, 0.1])
    results = read_results(COMPARISON, tmp_path)
    assert [results[Cell("signs", 0, "tempo", seed)].alarm for seed in (0, 1)] == [2, None]
    critic = [line.split(" | ") for line in tables(COMPARISON, results).splitlines()[11:13]]
    assert [row[-4] for row in critic] == ["2 (1 of 2)", "none"]


def test_an_arm_that_samples_more_in_an_iteration_is_read_earlier(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_cell(tmp_path, seed, "tempo", [0.5, 0.4], responses=9)
        write_cell(
            tmp_path, seed, "ttrl", [0.3, 0.1], responses=16, tokens=200
        )  # 16 of 18 after one iteration, then 32
    result = read_results(COMPARISON, tmp_path)[Cell("signs", 0, "ttrl", 0)]
    assert (result.at, result.work.responses, result.last) == (1, 16, {"unlabelled/mean@4": 0.3})


def test_unequal_work_is_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_cell(tmp_path / "responses", seed, "tempo", [0.5, 0.4])
        write_cell(tmp_path / "responses", seed, "ttrl", [0.3, 0.1], responses=9 + seed)
        write_cell(tmp_path / "tokens", seed, "tempo", [0.5, 0.4])
        write_cell(tmp_path / "tokens", seed, "ttrl", [0.3, 0.1], tokens=116)
    with pytest.raises(UserError, match=r"on signs, ttrl sampled 19 responses and tempo 32; tolerance allows 15%"):
        read_results(COMPARISON, tmp_path / "responses")
    with pytest.raises(UserError, match=r"on signs, ttrl sampled 464 tokens and tempo 400; tolerance allows 15%"):
        read_results(COMPARISON, tmp_path / "tokens")


def test_a_cell_without_the_evaluation_that_the_table_shows_is_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_cell(tmp_path, seed, "tempo", [0.5])
        write_cell(tmp_path, seed, "ttrl", [0.3])
    with pytest.raises(
        UserError, match=r"seed0/tempo was not evaluated after 2 iterations; choose an evaluation\.every"
    ):
        read_results(COMPARISON, tmp_path)


def test_the_interval_is_of_the_mean_over_runs() -> None:
    assert interval([0.5]) == (0.5, 0.5, 0.5)
    mean, low, high = interval([0.0, 1.0] * 50)
    assert mean == 0.5
    # the standard error of a hundred fair coins is .05; 1.96 of them on either side
    assert low == pytest.approx(0.402, abs=0.01)
    assert high == pytest.approx(0.598, abs=0.01)
