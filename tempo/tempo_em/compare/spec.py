"""A comparison as strict models: which arms, on which tasks, from how many bases and seeds. See comparisons/*.yaml."""

import functools
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, ValidationError, model_validator
from tempo_engine.errors import UserError

from tempo_em.loading import load_recipe, packaged, parse_yaml, yaml_word
from tempo_em.recipe import Recipe
from tempo_em.recipe_base import Count, Positive, SetName, Strict
from tempo_em.run_folder import can_share_start


class Arm(Strict):
    """One way to train: a method's preset and what is set on top of the task's recipe, as `a.b: value`."""

    method: str
    set: dict[str, Any] = Field(default={})


class Long(Strict):
    """Some cells go on for longer than those of the table, to see where the curves lead."""

    iterations: Positive
    arms: tuple[str, ...]
    bases: tuple[Count, ...] = (0,)
    seeds: tuple[Count, ...] = (0,)


class Task(Strict):
    """A recipe, and how often everything is repeated on it."""

    recipe: str = Field(description="a packaged recipe's name, or a path")
    bases: tuple[Count, ...] = Field(default=(0, 1, 2), min_length=1, description="seeds of model, cold start, critic")
    seeds: tuple[Annotated[int, Field(ge=0, lt=1000)], ...] = Field(
        default=(0, 1, 2), min_length=1, description="of the EM loop: other questions, other responses from one base"
    )
    set: dict[str, Any] = Field(default={}, description="for all arms, under what an arm sets itself")
    arms: tuple[str, ...] | None = Field(default=None, description="a choice among the arms; none: all")
    long: Long | None = None


class Comparison(Strict):
    """Every arm on every task, base and seed. The first arm is the one that others are compared with."""

    title: str
    iterations: Positive = Field(description="of the EM loop, for every cell of the table")
    arms: dict[SetName, Arm] = Field(min_length=2)
    tasks: dict[SetName, Task] = Field(min_length=1)
    tolerance: float = Field(
        default=0.15, ge=0, description="sampled responses and tokens may differ from the first arm's by this share"
    )

    @model_validator(mode="after")
    def known(self) -> "Comparison":
        for name, task in self.tasks.items():
            chosen = [*(task.arms or ()), *(task.long.arms if task.long else ())]
            if unknown := set(chosen) - set(self.arms):
                raise ValueError(f"tasks.{name} names the arm {min(unknown)!r}; arms: {', '.join(self.arms)}")
            if task.long and task.long.iterations < self.iterations:
                raise ValueError(f"tasks.{name}.long.iterations is less than iterations, which every cell has")
        return self

    def arms_of(self, task: Task) -> list[str]:
        """In the order of the comparison, so that its first arm leads where it takes part."""
        return [name for name in self.arms if task.arms is None or name in task.arms]


def load_comparison(where: str) -> tuple[str, Comparison]:
    """Name and content of the comparison at a path, or of the packaged one of that name; all its recipes are tried.

    Raises UserError with one sentence for anything wrong in it.
    """
    ready, path = packaged("comparisons"), Path(where)
    if path.is_file():
        name, text = path.stem, path.read_text(encoding="utf-8")
    elif where in ready:
        name, text = where, ready[where]
    else:
        raise UserError(f"there is no comparison {where!r}: neither a file nor one of {', '.join(ready)}")
    try:
        comparison = Comparison.model_validate(parse_yaml(text))
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place, said = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise UserError(f"{where}: {place + ': ' if place else ''}{said}") from error
    for task in comparison.tasks.values():
        for arm in comparison.arms_of(task):
            recipe_of(task, comparison.arms[arm])
    return name, comparison


def recipe_of(task: Task, arm: Arm) -> Recipe:
    """Raises UserError when they make no recipe."""
    return _resolved(task.recipe, tuple(settings_of(arm, task)))


@functools.cache
def _resolved(recipe: str, settings: tuple[str, ...]) -> Recipe:
    return load_recipe(recipe, list(settings)).recipe


def share_start(task: Task, one: Arm, other: Arm) -> bool:
    """Whether two arms could begin their EM loops at the same point."""
    return _share_start(task.recipe, tuple(settings_of(one, task)), tuple(settings_of(other, task)))


@functools.cache
def _share_start(recipe: str, one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return can_share_start(_resolved(recipe, one), _resolved(recipe, other))


def settings_of(arm: Arm, task: Task) -> list[str]:
    """As `--set` takes them."""
    settings = {"method": arm.method, **task.set, **arm.set}
    return [f"{path}={yaml_word(value)}" for path, value in settings.items()]
