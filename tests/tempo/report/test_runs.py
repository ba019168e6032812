import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tempo_em.loading import load_recipe
from tempo_em.report.runs import flat, groups, json_lines, names_of, number, origins_of, read_run
from tempo_em.report.series import evaluated, over_seeds, ratio, thinned
from tempo_engine.errors import UserError

WriteRun = Callable[..., Path]


def test_a_run_is_read_with_the_origin_of_each_setting(write_run: WriteRun) -> None:
    run = read_run(write_run("a", "mstep.optim.lr=2e-4"))
    assert (run.method, run.planned, run.done, run.is_finished) == ("tempo", 4, 4, True)
    assert run.sets == ["unlabelled", "heldout"]
    assert run.recipe["mstep.optim.lr"] == 2e-4
    origins = {setting.path: setting.origin for setting in run.settings}
    assert [origins[path] for path in ("mstep.optim.lr", "em.iterations", "em.seed")] == ["--set", "file", "default"]
    assert evaluated(run, "val-core/unlabelled/acc/mean@8") == {0: 0.2, 2: 0.3, 4: 0.5}


def test_every_origin_is_found_again() -> None:
    resolved = load_recipe("tiny", ["method=tempo_released", "seed=3"])
    found = origins_of(resolved.to_yaml())
    assert all(found[path] == origin for path, origin in resolved.origin.items())
    assert found["method"] == "--set"
    assert found["estep.clip"] == "preset tempo_released"


@pytest.mark.parametrize("content", [None, "not: [closed"])
def test_a_folder_that_is_no_run_is_refused_in_one_sentence(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(UserError, match="is not a run folder" if content is None else "cannot be read"):
        read_run(tmp_path)


def test_a_run_that_has_only_begun_has_a_recipe_and_nothing_else(write_run: WriteRun) -> None:
    folder = write_run("a", rows=[], samples=[], finished=False)
    (folder / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert (run.done, run.evaluations, run.sets, run.is_finished) == (0, [], [], False)


def test_settings_that_an_older_version_did_not_know_have_their_default(write_run: WriteRun) -> None:
    old, new = write_run("old"), write_run("new")
    text = (old / "recipe.yaml").read_text()
    (old / "recipe.yaml").write_text(
        "".join(line for line in text.splitlines(keepends=True) if "noise_rate" not in line)
    )
    run = read_run(old)
    assert next(s.origin for s in run.settings if s.path == "em.noise_rate") == "default of a later version"
    assert len(groups([run, read_run(new)])) == 1


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n[2]\n{"step": 3, "sta')
    assert json_lines(file) == [{"step": 1}]


@given(st.binary())
def test_no_bytes_in_a_file_stop_its_reading(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.mktemp("x") / "metrics.jsonl"
    file.write_bytes(content)
    assert all(isinstance(row, dict) for row in json_lines(file))


def test_only_finite_numbers_count() -> None:
    values = [1, 0.5, True, None, "3", float("nan"), float("inf"), [1]]
    assert [number(value) for value in values] == [1.0, 0.5, *[None] * 6]


def test_runs_that_differ_in_seeds_belong_together(write_run: WriteRun) -> None:
    settings = [["seed=1"], ["seed=2", "em.seed=5"], ["seed=1", "mstep.optim.lr=0.1"], ["method=ttrl"]]
    runs = [read_run(write_run(str(i), *each)) for i, each in enumerate(settings)]
    found = groups(runs)
    assert [[run.folder.name for run in group] for group in found] == [["0", "1"], ["2"], ["3"]]
    assert names_of(found) == ["tempo, mstep.optim.lr 0.001", "tempo, mstep.optim.lr 0.1", "ttrl"]


def test_a_band_spans_the_seeds_where_all_have_measured() -> None:
    curve = over_seeds("x", [{0: 0.1, 5: 0.2, 10: 0.9}, {0: 0.3, 5: 0.6}])
    assert curve.points == [(0.0, pytest.approx(0.2)), (5.0, pytest.approx(0.4))]
    assert curve.band == [(0.0, 0.1, 0.3), (5.0, 0.2, 0.6)]
    assert over_seeds("x", [{0: 0.1}]).band == []
    assert over_seeds("x", [{1: 0.1}, {2: 0.5}]).points == [(1.0, 0.1), (2.0, 0.5)]


def test_many_iterations_are_shown_as_means_of_neighbours() -> None:
    assert thinned({i: float(i) for i in range(1, 6)}, most=2) == {3: 2.0, 5: 4.5}
    assert thinned({1: 1.0}, most=2) == {1: 1.0}


def test_a_rate_without_its_parts_is_none() -> None:
    row = {"tokens": 10, "seconds": 4.0, "text": "x"}
    assert ratio(row, ["tokens"], ["seconds"]) == 2.5
    assert ratio(row, ["tokens"], ["text"]) is None


def test_nested_settings_are_dotted() -> None:
    assert flat({"em": {"seed": 1, "x": {}}, "a": [1]}) == {"em.seed": 1, "em.x": {}, "a": [1]}
    assert flat(json.loads("{}")) == {}
