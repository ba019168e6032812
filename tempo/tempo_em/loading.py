"""Recipe file + preset + `--set` -> Recipe, with the origin of every value and errors that name the place and the choices."""

import difflib
import re
import types
import typing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from tempo_engine.errors import UserError

from tempo_em.contradictions import contradictions
from tempo_em.presets import PRESETS
from tempo_em.recipe import Recipe
from tempo_em.recipe_base import Strict
from tempo_em.recipe_data import ROWS_TAGS, source_tag
from tempo_em.recipe_generated import GENERATORS


@dataclass(frozen=True)
class ResolvedRecipe:
    """A recipe and, for each dotted path, which layer its value came from: default, preset, file or --set."""

    name: str
    recipe: Recipe
    origin: dict[str, str]

    def to_yaml(self) -> str:
        """The whole recipe with the origin of each value as a comment; a valid recipe again."""
        return "\n".join(_annotated(self.recipe.model_dump(mode="json"), self.origin, "", 0)) + "\n"


def packaged(kind: Literal["recipes", "comparisons"]) -> dict[str, str]:
    """Name -> text of the YAML files of a kind that ship with the package."""
    folder = resources.files("tempo_em") / kind
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in found}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 takes 1e-6 for text; everyone means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """What YAML text says. Raises yaml.YAMLError."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def load_recipe(where: str, settings: list[str], overrides: list[tuple[str, Any]] | None = None) -> ResolvedRecipe:
    """The recipe at a path, or the packaged one of that name, with `a.b=c` settings and then `overrides` on top.

    Raises UserError with one sentence for anything wrong in it.
    """
    ready = packaged("recipes")
    path = Path(where)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if not path.is_file():
            raise UserError(f"the recipe {where} does not exist")
        name, base = path.stem, path.parent
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"the recipe {where} is not UTF-8 text") from error
    elif where in ready:
        name, text, base = where, ready[where], Path()
    else:
        raise UserError(f"there is no recipe {where!r}{_closest(where, ready)}; packaged recipes: {', '.join(ready)}")
    try:
        from_file = parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(from_file, dict):
        raise UserError(f"{where} must hold keys and values (model:, data:, ...), got {type(from_file).__name__}")
    return resolve(name, from_file, [*map(parse_setting, settings), *(overrides or [])], base)


def resolve(
    name: str, from_file: dict[str, Any], settings: list[tuple[str, Any]], base: Path = Path()
) -> ResolvedRecipe:
    """Lay preset, file and settings over the defaults. Relative paths in the file are relative to `base`."""
    origin: dict[str, str] = {}
    method = dict(settings).get("method", from_file.get("method", Recipe.model_fields["method"].default))
    if not isinstance(method, str) or method not in PRESETS:
        raise UserError(
            f"method {method!r} is not known{_closest(str(method), PRESETS)}; methods: {', '.join(PRESETS)}"
        )
    merged: dict[str, Any] = {}
    _lay(merged, PRESETS[method][1], f"preset {method}", origin)
    _lay(merged, from_file, "file", origin)
    for path, value in settings:
        nested: Any = value
        for key in reversed(path.split(".")):
            nested = {key: nested}
        _lay(merged, nested, "--set", origin)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise UserError(_explain(error.errors()[0])) from error
    for reason in contradictions(recipe):
        raise UserError(reason)
    return ResolvedRecipe(name, _with_absolute_paths(recipe, base, origin), origin)


def with_newer_settings(saved: Any) -> Any:
    """A recipe as a run saved it, and what recipes have learned to say since: it ran with the default of that.

    Unchanged when it says something that recipes no longer do.
    """
    try:
        return Recipe.model_validate(saved).model_dump(mode="json")
    except ValidationError:
        return saved


def parse_setting(setting: str) -> tuple[str, Any]:
    """`a.b=c` -> ("a.b", value typed as YAML would type it, 1e-6 included). Raises UserError without `=`."""
    path, equals, text = setting.partition("=")
    if not equals or not all(path.split(".")):
        raise UserError(f"--set wants a.b=value, got {setting!r}")
    try:
        return path.strip().replace("-", "_"), parse_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {setting!r}: the value is not valid YAML") from error


def _lay(under: dict[str, Any], over: dict[str, Any], source: str, origin: dict[str, str], prefix: str = "") -> None:
    """Merge `over` into `under`, remembering the source of each leaf. A source of prompts is replaced whole by another kind."""
    for key, value in over.items():
        path = f"{prefix}{key}"
        old = under.get(key)
        changes_kind = prefix.startswith("data.") and source_tag(value) not in (None, source_tag(old))
        if isinstance(value, dict) and isinstance(old, dict) and not changes_kind:
            _lay(old, value, source, origin, f"{path}.")
        elif isinstance(value, dict):
            under[key] = {}
            _lay(under[key], value, source, origin, f"{path}.")
        else:
            under[key] = value
            origin[path] = source


def _with_absolute_paths(recipe: Recipe, base: Path, origin: dict[str, str]) -> Recipe:
    """Paths in a recipe file are meant from where the file lies, those of --set from the working directory."""

    def fix(model: Strict, prefix: str) -> Strict:
        changes = {}
        for field in type(model).model_fields:
            value, here = getattr(model, field), f"{prefix}{field}"
            if isinstance(value, Path):
                changes[field] = (Path.cwd() if origin.get(here) == "--set" else base.resolve()) / value.expanduser()
            elif isinstance(value, Strict):
                changes[field] = fix(value, f"{here}.")
            elif isinstance(value, dict) and any(isinstance(v, Strict) for v in value.values()):
                changes[field] = {k: fix(v, f"{here}.{k}.") for k, v in value.items()}
        return model.model_copy(update=changes)

    fixed = fix(recipe, "")
    assert isinstance(fixed, Recipe)
    return fixed


def _explain(error: ErrorDetails) -> str:
    """One sentence for one pydantic error: the full path, what is wrong, and for unknown keys the nearest and the valid ones."""
    loc = [str(part) for part in error["loc"]]
    # pydantic puts the union's tag into the location, after a source's (or cold_start.task's) name or its number in a mix; the user
    # never wrote it.
    first = 3 if loc[1:2] == ["evaluation"] else 2
    after_name = {*GENERATORS, *ROWS_TAGS}
    loc = [
        part
        for i, part in enumerate(loc)
        if loc[0] not in ("data", "cold_start")
        or not ((i == first and part in after_name) or (i > first and loc[i - 2] == "of" and part in GENERATORS))
    ]
    path = ".".join(loc)
    if error["type"] == "extra_forbidden":
        choices = _fields_at([str(part) for part in error["loc"][:-1]])
        parent = ".".join(loc[:-1])
        return f"{path} is not an option{_closest(loc[-1], choices)}; {parent or 'a recipe'} takes {', '.join(choices)}"
    if error["type"] == "union_tag_invalid":
        # Only sources may be files; the parts of a mix are no mixes either.
        known = error.get("ctx", {}).get("expected_tags", "")
        names = ", ".join(name for name in GENERATORS if f"'{name}'" in known)
        rows = " (or give jsonl: FILE, parquet: FILE, hub: ORG/NAME or dataset: NAME)" if "'jsonl'" in known else ""
        return f"{path}: the generator is not known; generators: {names}{rows}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing":
        return f"{path} is missing; the recipe needs it"
    if error["type"] == "value_error":
        return f"{path}: {message}" if path else message
    return f"{path}: {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _fields_at(loc: list[str]) -> list[str]:
    """Names of the options at a location of the recipe, following models, unions (by tag) and dictionaries."""
    annotation: Any = Recipe
    for part in loc:
        models = _models_in(annotation)
        by_tag = [m for m in models if _tag(m) == part]
        if by_tag:
            annotation = by_tag[0]
            continue
        fields = {k: f for m in models for k, f in m.model_fields.items()}
        annotation = fields[part].annotation if part in fields else annotation
    return [name for model in _models_in(annotation)[:1] for name in model.model_fields]


def _tag(model: type[BaseModel]) -> str:
    """What tells a source from the others in a union: its generator's name, else its own."""
    named = model.model_fields.get("generator")
    return typing.get_args(named.annotation)[0] if named else model.__name__.lower().removesuffix("source")


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return [annotation]
    return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]


def _closest(word: str, choices: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def _annotated(value: Any, origin: dict[str, str], path: str, depth: int) -> list[str]:
    lines = []
    for key, item in value.items():
        here = f"{path}.{key}".lstrip(".")
        if isinstance(item, dict) and item and not any(p == here for p in origin):
            lines += ["  " * depth + f"{key}:", *_annotated(item, origin, here, depth + 1)]
        else:
            lines.append("  " * depth + f"{key}: {yaml_word(item)}  # {origin.get(here, 'default')}")
    return lines


def yaml_word(value: Any) -> str:
    """A value in one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
