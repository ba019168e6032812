"""`data` of a recipe -> questions with who says what is right, their prompts, and a tokenizer that knows their words."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tempo_engine.data.load import Loaded
from tempo_engine.data.style import Style
from tempo_engine.errors import UserError
from tempo_engine.rollout import Prompt
from tempo_engine.tasks.question import Generator, Question, Split, check_disjoint, draw_questions
from tempo_engine.tokenizer import byte_tokenizer, to_prompts, word_tokenizer
from tempo_engine.verify import ExactMatch, Verifier
from tempo_engine.verify.pool import Pool

from tempo_em.recipe import Recipe
from tempo_em.recipe_data import RowsSource, Source
from tempo_em.sources import load_rows, sources_of
from tempo_em.verifying import make_pool


@dataclass(frozen=True)
class Dataset:
    """The questions of one source, who says what is right, and the generator or the rows behind them.

    `needs_answers`: not where a function or a judge may do without right answers.
    """

    questions: list[Question]
    verifier: Verifier
    generator: Generator | None = None
    loaded: Loaded | None = None
    needs_answers: bool = True

    @property
    def unanswered(self) -> Question | None:
        """The first question of which nobody could say what is right."""
        return next((q for q in self.questions if self.needs_answers and not q.answers), None)


def load_datasets(recipe: Recipe) -> dict[str, Dataset]:
    """Every source of the recipe. Labelled, unlabelled and each evaluation set must not share a question with another role."""
    splits: dict[str, Split] = {"labelled": "labelled", "unlabelled": "unlabelled"}
    pool = make_pool()
    datasets = {
        name: _dataset(
            source,
            splits.get(name, "heldout"),
            recipe.seed if name == "labelled" else recipe.loop_seed,
            f"data.{name}",
            pool,
        )
        for name, source in sources_of(recipe.data).items()
    }
    for name in datasets:
        if name != "unlabelled" and (unanswered := datasets[name].unanswered):
            raise UserError(
                f"data.{name} needs answers, but {str(unanswered.content)[:60]!r} has none; name its answer column"
            )
    for name in list(datasets)[1:]:
        check_disjoint({f"data.{n}": datasets[n].questions for n in ("labelled", "unlabelled", name) if n in datasets})
    return datasets


def _dataset(source: Source, split: Split, seed: int, where: str, pool: Pool) -> Dataset:
    if isinstance(source, RowsSource):
        loaded, verifier = load_rows(source, split, where, pool)
        return Dataset(loaded.questions, verifier, loaded=loaded, needs_answers=source.verified.compares_answers)
    generator = source.generate()
    questions = draw_questions(generator, split, source.count, seed=seed, where=where)
    return Dataset(questions, ExactMatch(generator.extract), generator)


def make_prompts(
    dataset: Dataset, style: Style, tokenizer: Any, limit: int, where: str
) -> tuple[list[Prompt], Dataset]:
    """Prompts, and the questions they belong to: a row whose prompt is too long is a bad row."""
    ask = partial(to_prompts, dataset.questions, tokenizer, max_tokens=limit, where=where, style=style)
    if dataset.loaded is None:
        return ask(), dataset
    intake = dataset.loaded.intake
    prompts = ask(refuse=intake.drop)
    intake.check()
    if not prompts:
        raise UserError(f"{where}: every prompt is longer than rollout.max_prompt_tokens {limit}; raise it")
    return prompts, replace(dataset, questions=[q for q in dataset.questions if q.id in intake.questions])


def tokenizer_for(datasets: dict[str, Dataset]) -> Any:
    """For a fresh model: one token a word when every prompt is generated from known words, else one token a byte."""
    vocabularies = [d.generator.vocabulary() if d.generator else None for d in datasets.values()]
    if any(words is None for words in vocabularies):
        return byte_tokenizer()
    return word_tokenizer(sorted({word for words in vocabularies for word in words or ()}))
