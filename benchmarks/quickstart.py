"""TEMPO against its baselines on the quickstart task: same start, same number of sampled responses, several seeds.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--methods tempo rlvr ...] [--jobs 2] [--out runs/compare]

A seed decides the fresh model, the cold start, the critic's warm-up and which questions are labelled, unlabelled and held out. The
first method of a seed runs in full; the others begin their EM loop where it began (--start). Finished runs are not repeated, so the
script can be stopped and started again. Writes comparison.json, a table in Markdown and a figure into the output folder, and
refuses to compare runs whose numbers of sampled responses differ.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tempo_em.plot import evaluation_points

METHODS = ("tempo", "rlvr", "ttrl", "frozen_critic", "empo", "tempo_pure")
COLOURS: dict[str, str] = dict(
    zip(METHODS, ("#0b6e99", "#0f7b6c", "#d9730d", "#9b9a97", "#ad1a72", "#6940a5"), strict=True)
)
SHOWN = {
    "unlabelled": ("mean@16", "pass@8", "maj@16", "distinct_answers", "critic/auroc", "critic/overvaluation"),
    "heldout": ("mean@16", "pass@8"),
    "labelled_heldout": ("mean@16",),
}


def run(recipe: str, method: str, seed: int, out: Path, start: Path | None, settings: list[str]) -> Path:
    """One run, resumed if it was stopped; its folder."""
    folder = out / f"{method}-seed{seed}"
    if not (folder / "summary.json").is_file():
        command = [sys.executable, "-m", "tempo_em", "train", recipe, "--resume", "auto", "--run-dir", str(folder)]
        command += [f"--set=method={method}", f"--set=seed={seed}", *(f"--set={s}" for s in settings)]
        command += ["--start", str(start)] if start else []
        with (out / f"{folder.name}.log").open("a") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return folder


def run_all(args: argparse.Namespace) -> list[dict[str, Path]]:
    """method -> run folder for each seed; first the runs that the others start from."""
    first, *others = args.methods
    with ThreadPoolExecutor(args.jobs) as pool:
        starts = list(pool.map(lambda seed: run(args.recipe, first, seed, args.out, None, args.set), args.seeds))
        cells = [(method, seed, start) for seed, start in zip(args.seeds, starts, strict=True) for method in others]
        folders = list(pool.map(lambda c: run(args.recipe, c[0], c[1], args.out, c[2], args.set), cells))
    runs = [{first: start} for start in starts]
    for (method, seed, _), folder in zip(cells, folders, strict=True):
        runs[args.seeds.index(seed)][method] = folder
    return runs


def compare(runs: list[dict[str, Path]]) -> dict[str, Any]:
    """method -> stage -> set -> metric -> one value a seed."""
    responses = {str(folder): sampled_responses(folder) for seeds in runs for folder in seeds.values()}
    if len(set(responses.values())) > 1:
        raise SystemExit(f"these runs did unequal work, so they are not compared (sampled responses): {responses}")
    table: dict[str, Any] = {}
    for seeds in runs:
        for method, folder in seeds.items():
            summary = json.loads((folder / "summary.json").read_text())
            table.setdefault(method, {}).setdefault("tokens", []).append(summary["tokens"]["em_generated"])
            for stage in ("start", "final"):
                for set_name, metrics in SHOWN.items():
                    for metric in metrics:
                        value = summary["stages"][stage][set_name].get(metric)
                        place = table.setdefault(method, {}).setdefault(stage, {}).setdefault(set_name, {})
                        place.setdefault(metric, []).append(value)
    return table


def sampled_responses(folder: Path) -> int:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return sum(round(row["rollout/responses"]) for row in rows if row.get("stage") == "em")


def markdown(table: dict[str, Any]) -> str:
    columns = [(s, m) for s, metrics in SHOWN.items() for m in metrics]
    names = (f"{s.replace('_', ' ')} {m.removeprefix('critic/').replace('_', ' ')}" for s, m in columns)
    head = ["method", *names, "sampled tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    first = next(iter(table.values()))
    rows = {"start": first["start"], **{method: stages["final"] for method, stages in table.items()}}
    for name, sets in rows.items():
        tokens = f"{np.mean(table[name]['tokens']) / 1000:.0f}k" if name in table else ""
        lines.append("| " + " | ".join([name, *(cell(sets[s][m]) for s, m in columns), tokens]) + " |")
    return "\n".join(lines) + "\n"


def cell(values: list[float | None]) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    return f"{np.mean(numbers):.3f} ({', '.join(f'{v:.3f}' for v in numbers)})"


def curves(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(EM iteration, value) of every evaluation; without iteration 0 where the run began at another one's start."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x, row[f"val-core/unlabelled/acc/{metric}"]) for x, row in evaluation_points(rows)]


def plot(runs: list[dict[str, Path]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    metrics = {"mean@16": ("accuracy (mean@16)", 0.6), "pass@8": ("solved within 8 samples (pass@8)", 1.0)}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    figure.suptitle(f"Learning from 256 unlabelled questions, {len(runs)} seeds (thin lines), equal sampled responses")
    for axis, (metric, (title, top)) in zip(axes, metrics.items(), strict=True):
        starts = [curves(next(iter(seeds.values())), metric)[0] for seeds in runs]
        for method in runs[0]:
            lines = []
            for seeds, start in zip(runs, starts, strict=True):
                points = curves(seeds[method], metric)
                points = points if points[0][0] == 0 else [start, *points]
                lines.append(points)
                axis.plot(*zip(*points, strict=True), color=COLOURS.get(method), alpha=0.25, linewidth=1)
            x = [point[0] for point in lines[0]]
            mean = np.mean([[y for _, y in points] for points in lines], axis=0)
            axis.plot(x, mean, color=COLOURS.get(method), label=method, linewidth=2.2, marker="o", markersize=3)
        axis.set(title=title, xlabel="EM iteration", ylim=(0, top))
        axis.grid(alpha=0.25)
    axes[0].legend(loc="upper left", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    runs = run_all(args)
    table = compare(runs)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    facts = {"commit": commit, "seeds": args.seeds, "minutes": (time.perf_counter() - began) / 60, "methods": table}
    (args.out / "comparison.json").write_text(json.dumps(facts, indent=1))
    (args.out / "comparison.md").write_text(markdown(table))
    plot(runs, args.out / "comparison.png")
    print(markdown(table))
    print(f"{facts['minutes']:.1f} minutes; figure and table in {args.out}")


if __name__ == "__main__":
    main()
