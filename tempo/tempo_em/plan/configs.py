"""Where a model's config comes from: its directory, the package when nothing is downloaded yet, or the recipe itself."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

from tempo_engine.errors import UserError

from tempo_em.recipe import Recipe
from tempo_em.recipe_data import RowsSource

# Beside its words a tokenizer for a fresh model has pad, end and unknown; without generators it has one token a byte.
SPECIAL_TOKENS, BYTES = 3, 256


def packaged_models() -> dict[str, dict[str, Any]]:
    """Directory name -> config.json of the models that the packaged recipes name, as published on the Hugging Face hub."""
    folder = resources.files("tempo_em") / "models"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return {f.name.removesuffix(".json"): json.loads(f.read_text(encoding="utf-8")) for f in found}


def model_config(recipe: Recipe) -> tuple[dict[str, Any], str]:
    """The config of the recipe's model and a phrase that says where it was found.

    Raises UserError when the directory has no usable config, or does not exist and none of its name is packaged.
    """
    path, create = recipe.model.path, recipe.model.create
    if create is not None:
        return {"vocab_size": fresh_vocab_size(recipe), **create}, "model.create"
    assert path is not None
    if not path.exists():
        packaged = packaged_models()
        if path.name not in packaged:
            raise UserError(
                f"{path} does not exist, and no config is packaged for {path.name}; packaged are {', '.join(packaged)}"
            )
        return packaged[path.name], f"the packaged config of {path.name}"
    return _read(path / "config.json"), f"{path}/config.json"


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file.parent} is not a Hugging Face model directory: {file} does not exist")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} must hold an object, got {type(config).__name__}")
    return config


def fresh_vocab_size(recipe: Recipe) -> int:
    """Tokens of the tokenizer that is built for a fresh model (see `tempo_em.datasets.tokenizer_for`)."""
    sources = [recipe.data.labelled, recipe.data.unlabelled, *recipe.data.evaluation.values()]
    vocabularies = [None if isinstance(s, RowsSource) else s.make().vocabulary() for s in sources]
    if any(words is None for words in vocabularies):
        return SPECIAL_TOKENS + BYTES
    return SPECIAL_TOKENS + len({word for words in vocabularies for word in words or ()})
