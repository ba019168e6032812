"""The folder of a run: who may write into it, what is in it from the start, which recipe it belongs to."""

import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from tempo_engine import checkpoint, parallel
from tempo_engine.errors import UserError

from tempo_em.loading import ResolvedRecipe, with_newer_settings
from tempo_em.recipe import Recipe

LOCK = ".lock"
# Settings that change neither data nor method: a resumed run may differ in them.
RESUME_MAY_CHANGE = (
    "checkpoint.", "evaluation.every", "alarms.", "tracking.", "parallel.", "threads",
    "micro_batch_tokens", "model.activation_checkpointing", "model.compile", "rollout.sglang.", "rollout.mismatch.",
)  # fmt: skip
# What happens before the EM loop: runs that start from the same point agree in these.
START_MUST_SHARE = ("seed", "model.", "critic.", "data.", "rollout.", "cold_start.", "initialisation.")


def may_resume(recipe: Recipe, run_dir: Path, *, resume: bool) -> bool:
    """Whether the folder holds a run that goes on. The main rank looks, all of them hear.

    Raises UserError when the folder is in use and nobody asked to resume, or belongs to another recipe.
    """

    def look() -> bool:
        if run_dir.exists() and not run_dir.is_dir():
            raise UserError(f"the run folder {run_dir} is a file; choose another --run-dir")
        if not run_dir.exists() or not any(path.name != LOCK for path in run_dir.iterdir()):
            return False
        if not resume:
            raise UserError(
                f"the run folder {run_dir} is not empty; add --resume to go on with it, or choose another --run-dir"
            )
        check_same_recipe(recipe, run_dir, lambda path: not path.startswith(RESUME_MAY_CHANGE))
        return bool(
            checkpoint.list_checkpoints(run_dir / "checkpoints")
        )  # else killed before its first: it begins again

    return parallel.from_main(look)


def check_start(recipe: Recipe, start_from: Path) -> None:
    """Raises UserError when a run of this recipe could not have begun as the one in that folder."""
    parallel.from_main(lambda: check_same_recipe(recipe, start_from, lambda path: path.startswith(START_MUST_SHARE)))


def has_other_questions(recipe: Recipe, start_from: Path) -> bool:
    """Whether a run that begins where that one's loop began has unlabelled and held-out questions of its own."""
    saved = yaml.safe_load((start_from / "recipe.yaml").read_text(encoding="utf-8"))
    return recipe.loop_seed != (saved["seed"] if saved["em"].get("seed") is None else saved["em"]["seed"])


def check_same_recipe(recipe: Recipe, run_dir: Path, matters: Callable[[str], bool]) -> None:
    """Raises UserError naming the first setting that matters and differs from the run's."""
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no recipe.yaml")
    saved = with_newer_settings(yaml.safe_load(file.read_text(encoding="utf-8")))
    for path, before, now in _differences(saved, recipe.model_dump(mode="json")):
        if matters(path):
            raise UserError(
                f"{run_dir} was started with {path} = {before!r}, the recipe now says {now!r}; make them agree"
            )


def can_share_start(one: Recipe, other: Recipe) -> bool:
    """Whether runs of these recipes could begin their EM loops at the same point."""
    differing = _differences(one.model_dump(mode="json"), other.model_dump(mode="json"))
    return not any(path.startswith(START_MUST_SHARE) for path, _, _ in differing)


def _differences(one: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(path, one's value, the other's) of each setting, None where there is none."""
    first, second = _flat(one), _flat(other)
    for path in sorted({*first, *second}):
        if first.get(path) != second.get(path):
            yield path, first.get(path), second.get(path)


class Lock:
    """Keeps a second run out of a folder: ranks can outlive a launcher that was killed. The main rank holds it, for all."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / LOCK
        self._file: IO[str] | None = None

    def take(self) -> None:
        """All ranks must ask. Raises UserError when another process holds it."""
        parallel.from_main(self._take)

    def _take(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self._file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"another process ({file.read()}) is running in {self.path.parent}; stop it or wait for it"
            ) from error
        except OSError:  # a file system without locks
            return
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {platform.node()}")
        file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


def begin_folder(resolved: ResolvedRecipe, run_dir: Path, device: torch.device) -> None:
    """Recipe and environment. What a run left that was killed before its first checkpoint goes."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for leftover in ("metrics.jsonl", "samples.jsonl", "rollouts.json", "tracking.json"):
        (run_dir / leftover).unlink(missing_ok=True)
    temporary = run_dir / ".recipe.yaml"
    temporary.write_text(resolved.to_yaml(), encoding="utf-8")
    temporary.replace(run_dir / "recipe.yaml")
    packages = {name: version(name) for name in ("tempo-engine", "torch", "transformers", "safetensors", "numpy")}
    environment = {
        "argv": sys.argv[1:], "python": platform.python_version(), "platform": platform.platform(), **packages,
        "device": str(device), "threads": torch.get_num_threads(), "processes": parallel.world_size(),
    }  # fmt: skip
    (run_dir / "environment.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
