"""What a run still needs: a recipe for a published model can be checked before its weights and data are downloaded."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from tempo_em.plan.configs import model_config
from tempo_em.plan.layout import check_positions
from tempo_em.recipe import Recipe
from tempo_em.recipe_data import JsonlSource, ParquetSource
from tempo_em.sources import sources_of


def before_training(recipe: Recipe) -> list[str]:
    """Where to put what is missing, when the recipe names a model whose weights are not there but whose config is packaged; else
    nothing, and building the run's parts says what is wrong.

    Raises UserError for a model that nobody knows, and for samples longer than the model's positions.
    """
    path = recipe.model.path
    if path is None or path.exists():
        return []
    config, _ = model_config(recipe)
    limit = config.get("max_position_embeddings")
    check_positions(recipe.rollout.max_prompt_tokens + recipe.rollout.max_new_tokens, limit)
    return [f"put the weights of {path.name} (a Hugging Face directory with safetensors) at {path}", *_missing(recipe)]


def _missing(recipe: Recipe) -> Iterator[str]:
    if recipe.critic.path is not None and not recipe.critic.path.exists():
        yield f"put the exported critic at {recipe.critic.path}"
    files: dict[Path, list[str]] = {}
    for name, source in sources_of(recipe.data).items():
        file = (
            source.jsonl
            if isinstance(source, JsonlSource)
            else source.parquet
            if isinstance(source, ParquetSource)
            else None
        )
        if file is not None and not file.is_file():
            files.setdefault(file, []).append(f"data.{name}")
    if recipe.rollout.backend == "sglang" and importlib.util.find_spec("sglang") is None:
        yield "install SGLang: pip install 'tempo-engine[sglang]'"
    for file, names in files.items():
        yield f"put the questions of {' and '.join(names)} at {file}"
