"""A question file of a recipe -> its questions, and who says what is right."""

from tempo_engine.tasks.answers import EXTRACTORS
from tempo_engine.tasks.jsonl import read_questions
from tempo_engine.tasks.question import Question
from tempo_engine.verify import ExactMatch, Verifier
from tempo_engine.verify.kinds import KINDS

from tempo_em.recipe_data import JsonlSource


def read_file(source: JsonlSource) -> tuple[list[Question], Verifier]:
    """Raises UserError for a file that cannot be read, or that holds answers of another kind."""
    kind, find = KINDS[source.verifier.type], EXTRACTORS[source.extract]
    questions = read_questions(
        source.jsonl, prompt_column=source.prompt, answer_column=source.answer, limit=source.limit, kind=kind
    )
    return questions, ExactMatch(kind.extract(find))
