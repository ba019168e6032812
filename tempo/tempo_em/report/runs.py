"""A run folder, read: finished, unfinished, half-written or of an older version. What it lacks is empty; nothing is validated."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from tempo_engine.errors import UserError

from tempo_em.loading import parse_yaml, with_newer_settings
from tempo_em.plot import evaluation_points

Row = dict[str, Any]
# Settings that change neither method nor data: runs that differ in them are runs of one recipe.
SEEDS = ("seed", "em.seed")
LATER = "default of a later version"
BESIDES_THE_METHOD = (
    "threads", "micro_batch_tokens", "parallel.", "checkpoint.", "evaluation.every", "alarms.", "tracking.",
    "model.activation_checkpointing", "model.compile", "rollout.sglang.", "rollout.mismatch.",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A line of the resolved recipe: Setting("mstep.optim.lr", 3e-4, "--set")."""

    path: str
    value: Any
    origin: str


@dataclass(frozen=True)
class Run:
    """What a run folder says. `evaluations`: (EM iteration, row) from the loop's start on; `base`: the one before it, if any.

    `iterations`: the rows of the EM loop's iterations; `stages`: those of the stages before.
    """

    folder: Path
    settings: list[Setting]
    environment: Row
    iterations: list[Row]
    stages: list[Row]
    evaluations: Sequence[tuple[int, Mapping[str, Any]]]
    base: Row | None
    samples: list[Row]
    seconds: Row
    is_finished: bool
    written: str

    @property
    def recipe(self) -> dict[str, Any]:
        """Value of each dotted path."""
        return {setting.path: setting.value for setting in self.settings}

    @property
    def method(self) -> str:
        return str(self.recipe.get("method", "unknown method"))

    @property
    def planned(self) -> int | None:
        """Iterations of the EM loop."""
        planned = number(self.recipe.get("em.iterations"))
        return None if planned is None else round(planned)

    @property
    def done(self) -> int:
        return max((round(number(row.get("iteration")) or 0) for row in self.iterations), default=0)

    @property
    def sets(self) -> list[str]:
        """Evaluation sets, the one that the method is for first."""
        names = {
            name.split("/")[1]
            for _, row in self.evaluations
            for name in row
            if name.startswith(("val-core/", "val-aux/"))
        }
        return sorted(names, key=lambda name: ({"unlabelled": 0, "heldout": 1}.get(name, 2), name))


def read_run(folder: Path) -> Run:
    """Raises UserError when this is no run folder, or one whose recipe cannot be read."""
    file = folder / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml")
    try:
        text = file.read_text(encoding="utf-8")
        values = flat(with_newer_settings(parse_yaml(text)))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    rows = json_lines(folder / "metrics.jsonl")
    iterations = [row for row in rows if row.get("stage") == "em"]
    summary = json_object(folder / "summary.json")
    origins = origins_of(text)
    written = max(path.stat().st_mtime for path in (file, folder / "metrics.jsonl") if path.exists())
    seconds = summary.get("seconds")
    return Run(
        folder=folder,
        settings=[Setting(path, value, origins.get(path, LATER)) for path, value in values.items()],
        environment=json_object(folder / "environment.json"),
        iterations=iterations,
        stages=[row for row in rows if "stage" in row and row["stage"] != "em"],
        evaluations=evaluation_points(rows),
        base=next((row for row in reversed(rows) if row.get("evaluation") == "base"), None),
        samples=json_lines(folder / "samples.jsonl"),
        seconds=seconds if isinstance(seconds, dict) else {},
        is_finished=(folder / "summary.json").is_file(),
        written=datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def json_lines(path: Path) -> list[Row]:
    """The objects of a file with one a line. A line that is none is left out: a running run may be writing the last one."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def json_object(path: Path) -> Row:
    """A file's object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"em": {"seed": 1}} as {"em.seed": 1}."""
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value} if prefix else {}
    return {path: leaf for key, item in value.items() for path, leaf in flat(item, f"{prefix}{key}.").items()}


def origins_of(text: str) -> dict[str, str]:
    """Dotted path -> where its value came from, out of the comments of a resolved recipe."""
    origins, parents = {}, []
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip(" "))
        key, colon, rest = line.strip().partition(":")
        if not colon or key.startswith("#"):
            continue
        parents = [*parents[: indent // 2], key]
        if "  # " in rest:
            origins[".".join(parents)] = rest.rsplit("  # ", 1)[1]
    return origins


def groups(runs: list[Run]) -> list[list[Run]]:
    """Runs of one recipe, which differ in their seeds, together; in the order given."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        what = {path: value for path, value in run.recipe.items() if path not in SEEDS and not is_aside(path)}
        found.setdefault(json.dumps(what, sort_keys=True, default=str), []).append(run)
    return list(found.values())


def is_aside(path: str) -> bool:
    return path.startswith(BESIDES_THE_METHOD)


def names_of(members: list[list[Run]]) -> list[str]:
    """What tells each group of runs from the others: its method; of several groups of one method also the settings in which they
    differ; where these do not tell them apart, the folder."""
    names = []
    for group in members:
        peers = [other[0] for other in members if other[0].method == group[0].method]
        said = [f"{path} {group[0].recipe.get(path)}" for path in _chosen_differently(peers)]
        parts = [group[0].method, *said[:3], *([f"and {len(said) - 3} more"] if len(said) > 3 else [])]
        names.append(", ".join(parts))
    return [
        f"{name} ({group[0].folder.name})" if names.count(name) > 1 else name
        for name, group in zip(names, members, strict=True)
    ]


def _chosen_differently(runs: list[Run]) -> list[str]:
    """Settings that runs of a method differ in because somebody said so."""
    chosen = {s.path for run in runs for s in run.settings if not s.origin.startswith(("default", "preset"))}
    recipes = [run.recipe for run in runs]
    return [
        path for path in recipes[0]
        if path in chosen and path not in SEEDS and not is_aside(path)
        and len({json.dumps(recipe.get(path), default=str) for recipe in recipes}) > 1
    ]  # fmt: skip
