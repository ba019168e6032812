"""The curves of a run as one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = ("#0b6e99", "#d9730d", "#6940a5", "#0f7b6c", "#ad1a72")


def plot_run(rows: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Accuracy and diversity on the unlabelled questions, accuracy on held-out sets, and the critic, over EM iterations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    points = evaluation_points(rows)
    sets = sorted({name.split("/")[1] for _, row in points for name in row if name.startswith("val-core/")})
    if not points or not sets:
        return
    shown = "unlabelled" if "unlabelled" in sets else sets[0]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), constrained_layout=True)
    figure.suptitle(title)
    metrics = [m for m in _metrics(points, shown) if m.startswith(("mean@", "maj@", "pass@8"))]
    _curves(axes[0], points, {m: f"val-core/{shown}/acc/{m}" for m in metrics}, f"{shown} questions")
    mean = next(m for m in metrics if m.startswith("mean@"))
    _curves(axes[1], points, {s: f"val-core/{s}/acc/{mean}" for s in sets}, f"{mean} by set")
    critic = {"AUROC": "critic/auroc", "mean value": "critic/value_mean", "ECE": "critic/ece"}
    _curves(
        axes[2], points, {label: f"val-aux/{shown}/{m}" for label, m in critic.items()}, f"critic on {shown} questions"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evaluation_points(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """(EM iteration, row) of every evaluation from the loop's start on, out of the rows of metrics.jsonl.

    A row of no known iteration is left out; of two rows of one evaluation the later one counts.
    """
    iterations = (row.get("iteration") for row in rows if row.get("stage") == "em")
    last = max((i for i in iterations if isinstance(i, int)), default=0)
    ends = {"start": "0", "final": str(last)}
    points = {}
    for row in rows:
        label = str(row.get("evaluation", "base"))
        after = ends.get(label, label.removeprefix("em/"))
        if after.isascii() and after.isdigit():
            points[label] = (int(after), row)
    return sorted(points.values(), key=lambda point: point[0])


def _metrics(points: Sequence[tuple[int, Mapping[str, Any]]], set_name: str) -> list[str]:
    prefix = f"val-core/{set_name}/acc/"
    return [name.removeprefix(prefix) for name in points[0][1] if name.startswith(prefix)]


def _curves(axis: Any, points: Sequence[tuple[int, Mapping[str, Any]]], names: Mapping[str, str], title: str) -> None:
    for (label, name), colour in zip(names.items(), COLOURS * 2, strict=False):
        xy = [(x, row[name]) for x, row in points if row.get(name) is not None]
        if xy:
            axis.plot(*zip(*xy, strict=True), marker="o", markersize=3, label=label, color=colour)
    axis.set(title=title, xlabel="EM iteration", ylim=(0, 1))
    axis.grid(alpha=0.25)
    if axis.lines:
        axis.legend(loc="best", fontsize=8)
