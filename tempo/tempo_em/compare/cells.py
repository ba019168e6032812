"""The runs of a comparison: which there are, where each begins, and running those that are not finished yet."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from tempo_engine.errors import Halted

from tempo_em.compare.spec import Comparison, settings_of, share_start


@dataclass(frozen=True, order=True)
class Cell:
    """One arm on one task from one base, with one seed of the EM loop; without a seed, the start that other cells begin at."""

    task: str
    base: int
    arm: str
    seed: int | None = None

    @property
    def name(self) -> str:
        """Also its folder: signs/base0/start-tempo, signs/base0/seed1/tempo."""
        folder = f"start-{self.arm}" if self.seed is None else f"seed{self.seed}/{self.arm}"
        return f"{self.task}/base{self.base}/{folder}"


def all_cells(comparison: Comparison) -> list[Cell]:
    """Every cell of the table, without the starts; those that others begin with come first."""
    cells = [
        Cell(name, base, arm, seed)
        for name, task in comparison.tasks.items()
        for base in task.bases
        for seed in task.seeds
        for arm in comparison.arms_of(task)
    ]
    return sorted(cells, key=lambda cell: (start := begins_at(comparison, cell)) is None or start.seed is not None)


def starts_of(comparison: Comparison) -> list[Cell]:
    """A start on each base for the first arm, and for the first of those with another critic or other data."""
    starts = [begins_at(comparison, cell) for cell in all_cells(comparison)]
    return list(dict.fromkeys(start for start in starts if start and start.seed is None))


def iterations_of(comparison: Comparison, cell: Cell) -> int:
    """How long its EM loop runs; the table looks at every cell after comparison.iterations."""
    long = comparison.tasks[cell.task].long
    if cell.seed is None:
        return 0
    goes_on = long and cell.arm in long.arms and cell.base in long.bases and cell.seed in long.seeds
    return long.iterations if long and goes_on else comparison.iterations


def begins_at(comparison: Comparison, cell: Cell) -> Cell | None:
    """The cell whose start is this one's: of the same seed the first arm's that can share it, which has evaluated it; for that one
    a start without a seed."""
    if cell.seed is None:
        return None
    task, arms = comparison.tasks[cell.task], comparison.arms
    leader = next(arm for arm in comparison.arms_of(task) if share_start(task, arms[arm], arms[cell.arm]))
    return replace(cell, seed=None) if leader == cell.arm else replace(cell, arm=leader)


def loop_seed(base: int, seed: int) -> int:
    """Other questions and other responses for each base too, and never those of a base itself: 1002 for base 0, seed 2."""
    return 1000 * (base + 1) + seed


def command(comparison: Comparison, cell: Cell, out: Path) -> list[str]:
    """`tempo-engine train` with everything that makes this cell. It goes on with what an interrupted one left."""
    task = comparison.tasks[cell.task]
    settings = [
        *settings_of(comparison.arms[cell.arm], task),
        f"seed={cell.base}",
        f"em.seed={'null' if cell.seed is None else loop_seed(cell.base, cell.seed)}",
        f"em.iterations={iterations_of(comparison, cell)}",
        "checkpoint.export=false",
    ]
    words = [sys.executable, "-m", "tempo_em", "train", task.recipe, "--resume", "auto"]
    words += ["--run-dir", str(out / cell.name), *(f"--set={setting}" for setting in settings)]
    start = begins_at(comparison, cell)
    return [*words, "--start", str(out / start.name)] if start else words


def is_finished(cell: Cell, out: Path) -> bool:
    return (out / cell.name / "summary.json").is_file()


def run_all(comparison: Comparison, out: Path, jobs: int, say: Callable[[str], None]) -> None:
    """Run what is not finished, `jobs` cells at a time and a thread each. An interrupt lets running cells save and stop.

    Raises Halted when a cell fails, after all others that can be run have been.
    """
    cells = all_cells(comparison)
    starts = starts_of(comparison)
    firsts = [cell for cell in cells if begins_at(comparison, cell) in starts]
    stages = [starts, firsts, [cell for cell in cells if cell not in firsts]]
    failed: list[Cell] = []
    count, total = 0, sum(map(len, stages))
    for stage in stages:
        ready = [c for c in stage if not (s := begins_at(comparison, c)) or is_finished(s, out)]
        for cell, code in _run_stage(comparison, ready, out, jobs):
            count += 1
            say(f"[{count}/{total}] {cell.name}: {_outcome(cell, out) if code == 0 else f'failed ({code})'}")
            failed += [cell] if code else []
    if failed:
        raise Halted(f"{len(failed)} cells failed, the first is {failed[0].name}: see {out / failed[0].name}.log")


def _run_stage(comparison: Comparison, cells: list[Cell], out: Path, jobs: int) -> Iterable[tuple[Cell, int]]:
    running: dict[Cell, subprocess.Popen[bytes]] = {}

    def run(cell: Cell) -> int:
        if is_finished(cell, out):
            return 0
        log = out / f"{cell.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(command(comparison, cell, out), stdout=file, stderr=file, env=environment)
            running[cell] = process
            code = process.wait()
        del running[cell]
        return code

    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            for process in list(running.values()):
                process.send_signal(signal.SIGTERM)
            raise


def _outcome(cell: Cell, out: Path) -> str:
    summary = json.loads((out / cell.name / "summary.json").read_text())
    ends = [summary["stages"][stage].get("unlabelled", {}) for stage in ("start", "final")]
    metric = next((name for name in ends[0] if name.startswith("mean@")), None)
    seconds = summary["seconds"].get("stage/em", 0.0)
    if metric is None:
        return f"EM loop {seconds:.0f} s"
    return f"{metric} {ends[0][metric]:.3f} -> {ends[1][metric]:.3f}, EM loop {seconds:.0f} s"
