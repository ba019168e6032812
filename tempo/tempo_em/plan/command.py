"""`tempo-engine plan`: from a recipe's name to a page and an exit code."""

import json
from pathlib import Path

from tempo_engine.errors import UserError

from tempo_em.loading import load_recipe
from tempo_em.plan.advice import Change, advice
from tempo_em.plan.plan import Plan, make_plan
from tempo_em.plan.report import as_json, print_plan


def plan_recipe(
    where: str, settings: list[str], gpu: str | None, per_node: int | None, nodes: int, json_file: Path | None
) -> bool:
    """Print the plan, and when it does not fit what would; whether it fits.

    Without `gpu` a recipe in bfloat16 is planned for H100s, another for this computer; without `per_node` for 8 GPUs or 1 process.
    """
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {json_file.parent} does not exist")
    resolved = load_recipe(where, settings)
    gpu = gpu or ("h100" if resolved.recipe.model.dtype == "bfloat16" else "cpu")
    gpus = per_node or (1 if gpu == "cpu" else 8)

    def replan(change: Change) -> Plan:
        recipe = load_recipe(where, [*settings, *change.settings]).recipe if change.settings else resolved.recipe
        return make_plan(recipe, gpu=gpu, per_node=change.per_node or gpus, nodes=change.nodes or nodes)

    plan = replan(Change())
    trials = [] if plan.fits else advice(plan, replan)
    print_plan(resolved.name, plan, trials)
    if json_file is not None:
        json_file.write_text(json.dumps(as_json(resolved.name, plan, trials), indent=1), encoding="utf-8")
    return plan.fits
