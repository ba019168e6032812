"""Alarms: means of two iterations against the best two before, all by hand."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tempo_em.alarms import ACCURACY, PROMISE, Alarms
from tempo_em.cadence import AUROC
from tempo_em.recipe import AlarmsRecipe
from tempo_em.train import Training
from tempo_em.transfer import KEPT_LABELLED, KEPT_UNLABELLED

TWO = AlarmsRecipe(window=2, auroc_drop=0.1, accuracy_drop=0.1, promise_gap=0.2)


def raised(alarms: Alarms, name: str, values: list[float | None]) -> list[float | None]:
    return [alarms.look({name: value})[0].get(f"alarm/{name.split('/')[1].split('_')[0]}") for value in values]


def test_an_alarm_is_on_while_the_mean_is_further_below_the_best_one_than_allowed() -> None:
    # Means of two:               .85  .9   .85  .75  .75  .95
    values: list[float | None] = [0.9, 0.8, 1.0, 0.7, 0.8, 0.7, 1.2]
    assert raised(Alarms(TWO), AUROC, values) == [None, 0, 0, 0, 1, 1, 0]


def test_an_alarm_speaks_once_and_again_after_it_was_off() -> None:
    alarms = Alarms(TWO)
    said = [alarms.look({ACCURACY: value})[1] for value in (0.5, 0.5, 0.3, 0.1, 0.5, 0.5, 0.1)]
    assert [len(sentences) for sentences in said] == [0, 0, 0, 1, 0, 0, 1]
    assert said[3] == ["critic/score/mean has fallen from 0.500 to 0.200"]


def test_promises_that_rise_faster_than_verified_accuracy_are_an_alarm() -> None:
    alarms = Alarms(TWO)
    rows = [(0.3, 0.3), (0.3, 0.3), (0.4, 0.6), (0.4, 0.8)]  # the last means: .4, .7
    found = [alarms.look({ACCURACY: accuracy, PROMISE: promise}) for accuracy, promise in rows]
    assert [metrics.get("alarm/promise") for metrics, _ in found] == [None, 0, 0, 1]
    assert found[3][1] == ["critic/rewards/unlabelled has risen by 0.400, critic/score/mean by 0.100"]


def test_e_steps_that_shuffle_only_what_no_label_covers_are_an_alarm() -> None:
    alarms = Alarms(AlarmsRecipe(window=2, transfer_gap=0.2))
    # Means of two gaps:  0, .2, .3: an E-step that moves both alike (.5, .5) is none of its business.
    rows = [(0.9, 0.9), (0.5, 0.5), (0.9, 0.5), (0.9, 0.7)]
    found = [alarms.look({KEPT_LABELLED: labelled, KEPT_UNLABELLED: unlabelled}) for labelled, unlabelled in rows]
    assert [metrics.get("alarm/transfer") for metrics, _ in found] == [None, 0, 0, 1]
    assert found[3][1] == [
        "labels do not reach the unlabelled questions: critic/kept_unlabelled is 0.600, critic/kept_labelled 0.900"
    ]


def test_what_is_not_defined_is_passed_over_and_what_is_off_stays_silent() -> None:
    assert raised(Alarms(TWO), AUROC, [1.0, float("nan"), None, 1.0, 0.5, 0.5]) == [None, None, None, 0, 1, 1]
    off = Alarms(AlarmsRecipe(window=1, auroc_drop=None, accuracy_drop=None, promise_gap=None, transfer_gap=None))
    assert [
        off.look({AUROC: value, ACCURACY: value, PROMISE: 1 - value, KEPT_LABELLED: 1.0, KEPT_UNLABELLED: value})
        for value in (1.0, 0.0)
    ] == [({}, [])] * 2


def test_a_run_logs_its_alarms_and_a_resumed_one_remembers(prepare: Callable[..., Training]) -> None:
    training = prepare("alarms.window=1", "em.iterations=3", "alarms.accuracy_drop=1e-9")
    training.run()
    rows = [json.loads(line) for line in (training.run_dir / "metrics.jsonl").read_text().splitlines()]
    em = [row for row in rows if row.get("stage") == "em"]
    accuracy = [row["critic/score/mean"] for row in em]
    assert [row["alarm/accuracy"] for row in em] == [
        float(max(accuracy[: i + 1]) - a > 1e-9) for i, a in enumerate(accuracy)
    ]
    resumed = Training(training.resolved, training.run_dir, training.display, resume=True)
    assert resumed.alarms._best[ACCURACY] == pytest.approx(max(accuracy))


def test_the_gap_of_promises_needs_labelled_and_unlabelled_outcomes(prepare: Callable[..., Training]) -> None:
    training = prepare("method=ttrl", "alarms.window=1")
    training.run()
    rows = [json.loads(line) for line in Path(training.run_dir / "metrics.jsonl").read_text().splitlines()]
    em = [row for row in rows if row.get("stage") == "em"]
    assert all("critic/rewards/unlabelled" in row and "alarm/promise" not in row for row in em)
