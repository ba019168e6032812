"""The whole command on a miniature: cells from one start, tables, curves, going on after an interruption."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tempo_em.compare.cells import all_cells, begins_at, command, iterations_of, starts_of
from tempo_em.compare.command import compare
from tempo_em.compare.spec import load_comparison
from tempo_em.loading import packaged
from tempo_engine.errors import Halted, UserError

MINIATURE = """
title: two arms
iterations: 2
arms:
  tempo: {method: tempo}
  tempo_released: {method: tempo_released, set: {em.labelled_group_size: 8, estep.filter: none}}
  ttrl: {method: ttrl}
tasks:
  signs:
    recipe: tiny
    bases: [0]
    seeds: [0, 1]
    set: {cold_start.steps: 20, evaluation.every: 1, evaluation.samples: 8, checkpoint.every: 0}
    long: {iterations: 3, arms: [tempo]}
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[str]]:
    """(comparison file, its folder, what was said)."""
    folder = tmp_path_factory.mktemp("compare")
    path, page, said = folder / "mini.yaml", folder / "page.md", []
    path.write_text(MINIATURE)
    page.write_text("before\n<!-- mini: begin -->\nold\n<!-- mini: end -->\nafter\n")
    compare(str(path), folder / "runs", jobs=2, into=page, say=said.append)
    return path, folder / "runs", said


def test_the_table_goes_between_its_marks_and_beside_every_number(finished: tuple[Path, Path, list[str]]) -> None:
    path, out, said = finished
    page = (path.parent / "page.md").read_text()
    assert page.startswith("before\n<!-- mini: begin -->\n**signs** (2 runs each: 1 base x 2 seeds")
    assert page.endswith("![curves](figures/mini.png)\n<!-- mini: end -->\nafter\n")
    assert (path.parent / "figures/mini.png").is_file()
    assert "| ttrl |" in page
    assert (out / "comparison.png").stat().st_size > 10_000
    cells = json.loads((out / "comparison.json").read_text())["cells"]
    assert [(c["arm"], c["seed"]) for c in cells] == [
        ("tempo", 0), ("tempo", 1), ("tempo_released", 0), ("tempo_released", 1), ("ttrl", 0), ("ttrl", 1),
    ]  # fmt: skip
    assert [list(c["points"]) for c in cells] == [["0", "1", "2", "3"]] + [["0", "1", "2"]] * 5
    assert {(c["at"], c["responses"]) for c in cells} == {(2, 128)}, "what a longer cell did after that does not count"
    assert len(said) == 8, "six cells, the start of tempo, and that of a critic with other targets"


def test_arms_of_a_seed_share_their_start_and_seeds_have_questions_of_their_own(
    finished: tuple[Path, Path, list[str]],
) -> None:
    _, out, _ = finished
    cells = {(c["seed"], c["arm"]): c for c in json.loads((out / "comparison.json").read_text())["cells"]}
    assert cells[0, "tempo"]["points"]["0"] == cells[0, "ttrl"]["points"]["0"] != cells[1, "tempo"]["points"]["0"]
    own = cells[0, "tempo_released"]["points"]["0"]
    assert own["unlabelled/mean@8"] == cells[0, "tempo"]["points"]["0"]["unlabelled/mean@8"], "the same policy"
    assert own["unlabelled/critic/brier"] != cells[0, "tempo"]["points"]["0"]["unlabelled/critic/brier"]
    prompts = [
        {json.loads(line)["prompt"] for line in (out / f"signs/base0/seed{seed}/tempo/samples.jsonl").open()}
        for seed in (0, 1)
    ]
    assert prompts[0] != prompts[1]


def test_what_is_finished_is_not_run_again_and_what_is_missing_is(finished: tuple[Path, Path, list[str]]) -> None:
    path, out, _ = finished
    kept, again = out / "signs/base0/seed0/tempo/summary.json", out / "signs/base0/seed1/ttrl/summary.json"
    before, table = kept.stat().st_mtime_ns, (out / "comparison.md").read_text().splitlines()[:8]
    again.unlink()
    compare(str(path), out, jobs=1, into=None, say=lambda _: None)
    assert kept.stat().st_mtime_ns == before
    assert again.is_file()
    after = (out / "comparison.md").read_text().splitlines()[:8]
    assert after == table


def test_a_cell_that_fails_is_named_and_the_others_are_run(tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    two_arms = MINIATURE.replace("seeds: [0, 1]", "seeds: [0]\n    arms: [tempo, ttrl]").replace(
        "iterations: 3", "iterations: 2"
    )
    path.write_text(two_arms)
    out = tmp_path / "runs"
    (out / "signs/base0/seed0/ttrl").mkdir(parents=True)
    (out / "signs/base0/seed0/ttrl/recipe.yaml").write_text("seed: 5")
    with pytest.raises(Halted, match=r"1 cells failed, the first is signs/base0/seed0/ttrl: see .*ttrl\.log"):
        compare(str(path), out, jobs=2, into=None, say=lambda _: None)
    assert (out / "signs/base0/seed0/tempo/summary.json").is_file()


def test_a_terminated_comparison_takes_its_cells_with_it_and_goes_on_later(tmp_path: Path) -> None:
    path, out = tmp_path / "mini.yaml", tmp_path / "runs"
    path.write_text(MINIATURE.replace("seeds: [0, 1]", "seeds: [0]").replace("steps: 20", "steps: 4000"))
    command = [sys.executable, "-m", "tempo_em", "compare", str(path), "--out", str(out), "--jobs", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    cell = out / "signs/base0/start-tempo"
    while not (cell / "metrics.jsonl").is_file():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=60) == 143
    assert not is_running(cell)
    assert list((cell / "checkpoints").iterdir()), "it saved before it left"
    assert not (cell / "summary.json").exists()


def is_running(cell: Path) -> bool:
    return any(str(cell) in (p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize("name", packaged("comparisons"))
def test_every_packaged_comparison_can_be_run(name: str) -> None:
    _, comparison = load_comparison(name)
    cells, starts = all_cells(comparison), starts_of(comparison)
    assert len({cell.name for cell in (*cells, *starts)}) == len(cells) + len(starts)
    for cell in cells:
        start = begins_at(comparison, cell)
        assert start in starts or cells.index(start) < cells.index(cell)  # pyright: ignore[reportArgumentType]
        every = next((s for s in command(comparison, cell, Path()) if s.startswith("--set=evaluation.every=")), "=20")
        assert comparison.iterations % (int(every.rsplit("=", 1)[1]) or iterations_of(comparison, cell)) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("recipe: tiny", "recipe: tinny"), r"there is no recipe 'tinny' \(did you mean tiny"),
        (("method: ttrl", "method: trl"), r"method 'trl' is not known"),
        (("arms: [tempo]", "arms: [grpo]"), r"tasks\.signs names the arm 'grpo'; arms: tempo, tempo_released, ttrl"),
        (("iterations: 3", "iterations: 1"), r"tasks\.signs\.long\.iterations is less than"),
        (("bases: [0]", "bases: []"), r"mini.yaml: tasks\.signs\.bases: "),
        (("title: two arms", "title: {"), r"mini.yaml is not valid YAML"),
    ],
)
def test_a_mistake_in_a_comparison_is_one_sentence(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(MINIATURE.replace(*change))
    with pytest.raises(UserError, match=said):
        compare(str(path), tmp_path / "runs", jobs=1, into=None, say=lambda _: None)
    assert not (tmp_path / "runs").exists()


def test_a_page_without_a_place_for_the_table_is_found_first(tmp_path: Path) -> None:
    path = tmp_path / "mini.yaml"
    path.write_text(MINIATURE)
    with pytest.raises(UserError, match="has no place for these tables; put the lines <!-- mini: begin -->"):
        compare(str(path), tmp_path / "runs", jobs=1, into=tmp_path / "page.md", say=lambda _: None)
