"""What samples.jsonl holds of an evaluation: a few responses to read, and what the critic thought of them token by token."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tempo_engine.evaluate import Judged
from tempo_engine.rollout import Rollout
from tempo_engine.tokenizer import pieces

SAMPLES = 8
# Of these samples also the tokens with their values: of a long response its beginning and its end.
WITH_VALUES, EACH_END = 4, 128


def sample_rows(rollouts: Sequence[Rollout], judged: Judged, tokenizer: Any, *, step: int) -> Iterator[dict[str, Any]]:
    """The first of the `step` samples of each of the first prompts, to read what the numbers are made of."""
    for number, index in enumerate(range(0, min(len(rollouts), SAMPLES * step), step)):
        rollout = rollouts[index]
        row: dict[str, Any] = {"prompt": rollout.prompt.text, "response": rollout.text, "right": judged.is_right[index]}
        if judged.terminal:
            row["terminal"] = round(judged.terminal[index], 3)
            row |= with_values(rollout, judged.values[index], tokenizer) if number < WITH_VALUES else {}
        yield row


def with_values(rollout: Rollout, values: Iterable[float], tokenizer: Any) -> dict[str, Any]:
    """`tokens`, their texts, and `values`: the critic's before the first of them, and after each. `left_out` tokens are missing
    after the first EACH_END."""
    ids, rounded = rollout.response_ids, [round(float(v), 3) for v in values]
    left_out = len(ids) - 2 * EACH_END
    if left_out <= 0:
        return {"tokens": pieces(tokenizer, ids), "values": rounded}
    resumes = len(ids) - EACH_END
    return {
        "tokens": [*pieces(tokenizer, ids[:EACH_END]), *pieces(tokenizer, ids[resumes:])],
        "values": [*rounded[: EACH_END + 1], *rounded[resumes + 1 :]],
        "left_out": left_out,
    }
