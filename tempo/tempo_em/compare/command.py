"""`tempo-engine compare`: run what is missing, refuse what is unequal, write tables and curves."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tempo_em.compare.cells import all_cells, is_finished, run_all, starts_of
from tempo_em.compare.report import place_in, plot, tables, to_json
from tempo_em.compare.results import read_results
from tempo_em.compare.spec import Comparison, load_comparison


def compare(where: str, out: Path | None, jobs: int, into: Path | None, say: Callable[[str], None]) -> Path:
    """Run a comparison into its folder (default runs/NAME); finished cells are not repeated. Returns the folder.

    Raises UserError for a comparison that cannot be run or is of unequal work, Halted when cells failed.
    """
    name, comparison = load_comparison(where)
    out = out or Path("runs") / name
    out.mkdir(parents=True, exist_ok=True)
    if into:
        place_in(into, name)  # a page without a place for it is found before hours of work
    handler = signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # as Ctrl-C, which cells hear too
    try:
        effort = _run(comparison, out, jobs, say)
    finally:
        signal.signal(signal.SIGTERM, handler)
    results = read_results(comparison, out)
    text = tables(comparison, results)
    facts = {"name": name, "jobs": jobs, "version": version("tempo-engine"), **effort}
    (out / "comparison.json").write_text(to_json(comparison, results, facts), encoding="utf-8")
    plot(comparison, results, out / "comparison.png")
    footer = (
        f"`tempo-engine compare {where} --jobs {jobs}`: {effort['minutes']:.0f} minutes in all, {len(results)} runs; "
        f"version {facts['version']}, commit {', '.join(effort['commits'])}, {effort['date']}.\n"
    )
    (out / "comparison.md").write_text(f"{text}\n{footer}", encoding="utf-8")
    if into:
        before, after = place_in(into, name)
        figure = into.parent / "figures" / f"{name}.png"
        figure.parent.mkdir(exist_ok=True)
        shutil.copyfile(out / "comparison.png", figure)
        into.write_text(f"{before}{text}\n{footer}\n![curves](figures/{figure.name}){after}", encoding="utf-8")
    return out


def _run(comparison: Comparison, out: Path, jobs: int, say: Callable[[str], None]) -> dict[str, Any]:
    """Run what is missing. Returns the minutes that all cells have taken together with earlier calls, the commits that they ran
    from, and the last day; a call that finds nothing to run adds nothing."""
    file = out / "effort.json"
    effort: dict[str, Any] = {"minutes": 0.0, "commits": [], "date": ""}
    if file.is_file():
        effort = json.loads(file.read_text())
    if all(is_finished(cell, out) for cell in (*starts_of(comparison), *all_cells(comparison))):
        return effort
    began = time.perf_counter()
    try:
        run_all(comparison, out, jobs, say)
    finally:
        effort["minutes"] += (time.perf_counter() - began) / 60
        effort["commits"] = list(dict.fromkeys([*effort["commits"], _commit()]))
        effort["date"] = datetime.now(UTC).date().isoformat()
        file.write_text(json.dumps(effort))
    return effort


def _commit() -> str:
    """Of the checkout that this code is run from, if it is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
