import pytest
from tempo_em.build import build
from tempo_em.cold_start import ColdStart
from tempo_em.loading import load_recipe
from tempo_engine.packing import PackedBatch

SETTINGS = ("cold_start.steps=3", "data.labelled.terms=[4]", "data.evaluation={}", "rollout.max_new_tokens=10")


def cold_start_of(*settings: str) -> ColdStart:
    parts = build(load_recipe("tiny", [*SETTINGS, *settings]).recipe)
    assert parts.cold_start is not None
    return parts.cold_start


def worked(cold_start: ColdStart, batch: PackedBatch) -> list[tuple[str, str]]:
    """(question, worked response) of each sequence, in words."""
    texts = [cold_start.tokenizer.decode(ids) for ids in batch.input_ids_N.split(batch.length_S.tolist())]
    prompts = (batch.length_S - batch.response_length_S).tolist()
    return [(" ".join(text.split()[:n]), " ".join(text.split()[n:])) for text, n in zip(texts, prompts, strict=True)]


@pytest.mark.parametrize(
    ("settings", "terms"), [((), {4}), (("cold_start.task={generator: signs, terms: [2, 3], largest: 4}",), {2, 3})]
)
def test_a_cold_start_works_the_labelled_task_or_one_of_its_own(settings: tuple[str, ...], terms: set[int]) -> None:
    cold_start = cold_start_of(*settings)
    pairs = [pair for step in range(3) for pair in worked(cold_start, cold_start.batch(step))]
    assert {len(question.split()) - 2 for question, _ in pairs} == terms  # besides the terms: = and the target


def test_a_wider_cold_start_still_never_shows_an_unlabelled_or_held_out_question() -> None:
    cold_start = cold_start_of(
        "cold_start.task={generator: signs, terms: [3], largest: 4}", "cold_start.batch_size=256"
    )
    hidden = {str(q.content) for q in build(load_recipe("tiny", [*SETTINGS]).recipe).datasets["unlabelled"].questions}
    shown = {question for step in range(4) for question, _ in worked(cold_start, cold_start.batch(step))}
    assert hidden
    assert not shown & hidden
