"""Generated questions in a recipe. A new generator is a class here and its line in TASKS; all else follows from that table."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from pydantic import AfterValidator, Field, Tag, create_model, model_validator
from tempo_engine.tasks import gym
from tempo_engine.tasks.arithmetic import Arithmetic
from tempo_engine.tasks.dates import Dates
from tempo_engine.tasks.few_shot import FewShot
from tempo_engine.tasks.gym import Gym
from tempo_engine.tasks.knights import Knights
from tempo_engine.tasks.linear import Linear
from tempo_engine.tasks.mix import Mix
from tempo_engine.tasks.modular import Modular
from tempo_engine.tasks.question import Generator
from tempo_engine.tasks.signs import Signs
from tempo_engine.tasks.sums import Sums
from tempo_engine.tasks.swaps import Swaps
from tempo_engine.tasks.syllogism import Syllogism
from tempo_engine.tasks.word_sort import WordSort
from tempo_engine.tasks.zebra import Zebra

from tempo_em.recipe_base import Count, Positive, Strict


class Task(Strict):
    """Settings of one generator. The first field names it: `generator: Literal["sums"]`."""

    @abstractmethod
    def make(self) -> Generator: ...


class SignsTask(Task):
    """Signs to target (see tempo_engine.tasks.signs)."""

    generator: Literal["signs"]
    terms: tuple[Annotated[int, Field(ge=2, le=10)], ...] = Field(default=(4,), min_length=1)
    largest: int = Field(default=6, ge=1, le=99)
    unique: bool = Field(default=False, description="only questions with exactly one right answer")

    def make(self) -> Generator:
        return Signs(self.terms, self.largest, self.unique)


class SwapsTask(Task):
    """Which of these swaps were made (see tempo_engine.tasks.swaps)."""

    generator: Literal["swaps"]
    terms: tuple[Annotated[int, Field(ge=2, le=10)], ...] = Field(default=(4,), min_length=1)
    unique: bool = Field(default=False, description="only questions with exactly one right answer (up to 6 terms)")

    def make(self) -> Generator:
        return Swaps(self.terms, self.unique)


class SumsTask(Task):
    """Sums with written-out steps (see tempo_engine.tasks.sums)."""

    generator: Literal["sums"]
    terms: tuple[Annotated[int, Field(ge=2, le=10)], ...] = Field(default=(3,), min_length=1)
    largest: int = Field(default=9, ge=1, le=999)

    def make(self) -> Generator:
        return Sums(self.terms, self.largest)


class ArithmeticTask(Task):
    """Expressions with +, -, * and brackets (see tempo_engine.tasks.arithmetic)."""

    generator: Literal["arithmetic"]
    terms: tuple[Annotated[int, Field(ge=2, le=10)], ...] = Field(default=(3,), min_length=1)
    largest: int = Field(default=9, ge=1, le=999)
    limit: int = Field(default=99, ge=1, le=999_999, description="no result on the way is further from 0")

    def make(self) -> Generator:
        return Arithmetic(self.terms, self.largest, self.limit)


class LinearTask(Task):
    """Linear equations with an integer solution (see tempo_engine.tasks.linear)."""

    generator: Literal["linear"]
    unknowns: tuple[Annotated[int, Field(ge=1, le=2)], ...] = Field(default=(1,), min_length=1)
    largest: int = Field(default=5, ge=1, le=50, description="coefficients and solutions are no further from 0")

    def make(self) -> Generator:
        return Linear(self.unknowns, self.largest)


class ModularTask(Task):
    """Sums and powers modulo a number (see tempo_engine.tasks.modular)."""

    generator: Literal["modular"]
    terms: tuple[Annotated[int, Field(ge=2, le=20)], ...] = Field(
        default=(3,), min_length=1, description="numbers of a sum, or the exponent of a power"
    )
    largest: int = Field(default=20, ge=1, le=999, description="numbers of a sum are up to this")
    modulus: int = Field(default=12, ge=2, le=99, description="the largest modulus")
    form: Literal["either", "sum", "power"] = "either"

    def make(self) -> Generator:
        return Modular(self.terms, self.largest, self.modulus, self.form)


class KnightsTask(Task):
    """Knights and knaves (see tempo_engine.tasks.knights)."""

    generator: Literal["knights"]
    people: tuple[Annotated[int, Field(ge=2, le=6)], ...] = Field(default=(3,), min_length=1)

    def make(self) -> Generator:
        return Knights(self.people)


class ZebraTask(Task):
    """Who and what is in each house (see tempo_engine.tasks.zebra)."""

    generator: Literal["zebra"]
    sizes: tuple[tuple[Annotated[int, Field(ge=2, le=4)], Annotated[int, Field(ge=2, le=4)]], ...] = Field(
        default=((3, 3),), min_length=1, description="houses and attributes of each"
    )

    def make(self) -> Generator:
        return Zebra(self.sizes)


class WordSortTask(Task):
    """Words in alphabetical order (see tempo_engine.tasks.word_sort)."""

    generator: Literal["word_sort"]
    words: tuple[Annotated[int, Field(ge=2, le=20)], ...] = Field(default=(4,), min_length=1)

    def make(self) -> Generator:
        return WordSort(self.words)


class SyllogismTask(Task):
    """Does it follow? (see tempo_engine.tasks.syllogism)."""

    generator: Literal["syllogism"]
    classes: tuple[Annotated[int, Field(ge=3, le=5)], ...] = Field(default=(3,), min_length=1)

    def make(self) -> Generator:
        return Syllogism(self.classes)


class DatesTask(Task):
    """Dates so many days apart (see tempo_engine.tasks.dates)."""

    generator: Literal["dates"]
    days: tuple[Annotated[int, Field(ge=1, le=9999)], ...] = Field(default=(60,), min_length=1)

    def make(self) -> Generator:
        return Dates(self.days)


def _safe(task: str) -> str:
    if task not in gym.TASKS:
        raise ValueError(gym.refusal(task))
    return task


class GymTask(Task):
    """Questions of reasoning-gym (see tempo_engine.tasks.gym)."""

    generator: Literal["gym"]
    task: Annotated[str, AfterValidator(_safe)]
    settings: dict[str, Any] = Field(default={}, description="the task's own, such as {min_terms: 2} for chain_sum")

    def make(self) -> Generator:
        return Gym(self.task, self.settings)


# What a recipe writes after `generator:`, here and in the parts of a mix.
TASKS: dict[str, type[Task]] = {
    "signs": SignsTask,
    "swaps": SwapsTask,
    "sums": SumsTask,
    "arithmetic": ArithmeticTask,
    "linear": LinearTask,
    "modular": ModularTask,
    "knights": KnightsTask,
    "zebra": ZebraTask,
    "word_sort": WordSortTask,
    "syllogism": SyllogismTask,
    "dates": DatesTask,
    "gym": GymTask,
}


def one_of(models: Mapping[str, type[Task]]) -> Any:
    """The union of models that a recipe tells apart by their names."""
    return Union[tuple(Annotated[model, Tag(name)] for name, model in models.items())]  # noqa: UP007


if TYPE_CHECKING:
    Part = Task
else:
    Part = Annotated[one_of(TASKS), Field(discriminator="generator")]


class MixTask(Task):
    """Several generators in turn (see tempo_engine.tasks.mix)."""

    generator: Literal["mix"]
    of: tuple[Part, ...] = Field(min_length=1, description="generators with their settings, without count and shots")
    weights: tuple[Annotated[int, Field(ge=1, le=100)], ...] | None = Field(
        default=None, description="how often each has its turn; equally often when left out"
    )

    @model_validator(mode="after")
    def one_weight_each(self) -> "MixTask":
        if self.weights is not None and len(self.weights) != len(self.of):
            raise ValueError(
                f"weights has {len(self.weights)} numbers for the {len(self.of)} generators in of; give one for each"
            )
        return self

    def make(self) -> Generator:
        return Mix(tuple(part.make() for part in self.of), self.weights or (1,) * len(self.of))


class GeneratedSource(Task):
    """What all generated sources have."""

    count: Positive
    shots: Count = Field(
        default=0,
        description="worked questions before each, for a model that was not trained on the task; end responses with rollout.stop",
    )

    def generate(self) -> Generator:
        """The generator, its questions shown after worked ones where the recipe wants that."""
        return FewShot(self.make(), self.shots) if self.shots else self.make()


def _source(task: type[Task]) -> type[GeneratedSource]:
    name = task.__name__.removesuffix("Task")
    source = create_model(f"{name}Source", __base__=(task, GeneratedSource), __doc__=f"Generated: {task.__doc__}")
    assert issubclass(source, GeneratedSource)
    return source


_ALL_TASKS: dict[str, type[Task]] = {**TASKS, "mix": MixTask}

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = Annotated[one_of(_ALL_TASKS), Field(discriminator="generator")]

GENERATORS = {name: _source(task) for name, task in _ALL_TASKS.items()}
