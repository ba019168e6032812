"""`tempo-engine export`: the models of a run from any of its checkpoints, while it runs or after."""

import os
import sys
from pathlib import Path

from tempo_engine import checkpoint
from tempo_engine.adapters import Lora
from tempo_engine.errors import UserError
from tempo_engine.export import Frozen, export_checkpoint
from tempo_engine.weights import DTYPES

from tempo_em.card import write_card
from tempo_em.loading import load_recipe
from tempo_em.recipe import Recipe


def export_run(run_dir: Path, target: Path, step: int | None) -> list[Path]:
    """Write `target`/policy and, if the run has one, `target`/critic, and the model card; returns what was written.

    Loads no data and needs no GPU. Raises UserError when there is no such run or checkpoint, or `target` is in use.
    """
    if int(os.environ.get("RANK", 0)):  # one of several that torchrun started: there is work for one only
        return []
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no recipe.yaml")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"--to {target} is in use already; name a folder that is new or empty")
    recipe = load_recipe(str(run_dir / "recipe.yaml"), []).recipe
    saved = _checkpoint(run_dir, step)
    skeleton, dtype = run_dir / "model", DTYPES[recipe.model.dtype]
    folders = export_checkpoint(saved, skeleton, target, dtype=dtype, frozen=_frozen(recipe))
    return [*folders, write_card(run_dir, target, int(saved.name.removeprefix(checkpoint.PREFIX)))]


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    folder = run_dir / "checkpoints"
    found = {int(path.name.removeprefix(checkpoint.PREFIX)): path for path in checkpoint.list_checkpoints(folder)}
    if not found:
        raise UserError(f"{run_dir} has no checkpoint yet; go on with it by tempo-engine train --resume {run_dir}")
    if step is None:
        return checkpoint.newest(folder, lambda text: print(text, file=sys.stderr))
    if step not in found:
        raise UserError(f"{run_dir} has no checkpoint of step {step}; it has those of {', '.join(map(str, found))}")
    problem = checkpoint.damage(found[step])
    if problem:
        raise UserError(f"the checkpoint of step {step} is damaged, {problem}; leave --step out for one that is whole")
    return found[step]


def _frozen(recipe: Recipe) -> Frozen | None:
    how = recipe.model.lora
    if how is None:
        return None
    lora = Lora(rank=how.rank, alpha=how.alpha, targets=how.targets, seed=recipe.seed)
    return Frozen(lora=lora, policy=recipe.model.path, critic=recipe.critic.path, seed=recipe.seed)
