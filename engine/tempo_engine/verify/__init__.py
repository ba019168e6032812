"""Whether a response is right: one protocol for string comparison, mathematics, a user's function and a judge."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

from tempo_engine.errors import Halted, UserError
from tempo_engine.rollout import Labelled, Rollout
from tempo_engine.tasks.answers import Extract, score


class Verifier(Protocol):
    """Judges responses to questions of one source. It is told the labels with each question and keeps none."""

    def extract(self, response: str) -> str | None:
        """The answer a response gives, in one spelling, for votes and clusters; None when it gives none. Never sees a label."""
        ...

    def rewards(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[float]:
        """How right each response is to the question beside it, in [0, 1]. Hostile responses get 0.

        Raises Halted when what it asks (a user's function, a judge) fails, and UserError for a mistake in it.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """Counts since the last call, by metric name: of this rank, the same names on each."""
        ...

    def close(self) -> None:
        """End whatever was started; the next question starts it again."""
        ...


class ExactMatch:
    """1.0 when the extracted answer is one of the right ones, else 0.0."""

    def __init__(self, extract: Extract) -> None:
        self._extract = extract

    def extract(self, response: str) -> str | None:
        return self._extract(response)

    def rewards(self, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[float]:
        return [score(self._extract, r.text, item.answers) for r, item in zip(responses, items, strict=True)]

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        pass


def verify(verifier: Verifier, responses: Sequence[Rollout], items: Sequence[Labelled]) -> list[float]:
    """The rewards, each rank asking for its share; all ranks hold the same responses and get all rewards.

    Raises Halted or UserError everywhere when a rank's verifier does so: the others must not wait for its share.
    """
    from tempo_engine import parallel  # imports torch, and recipes know kinds of answers without it

    def mine(share: list[int]) -> list[Any]:
        try:
            return verifier.rewards([responses[i] for i in share], [items[i] for i in share])
        except (Halted, UserError) as error:
            if parallel.world_size() == 1:
                raise
            return [[type(error).__name__, str(error)]] * len(share)

    rewards = parallel.together([len(r.response_ids) for r in responses], mine)
    for reward in rewards:
        if isinstance(reward, list):
            kind, text = reward
            raise UserError(text) if kind == "UserError" else Halted(text)
    return rewards


def metrics_of(verifiers: Sequence[Verifier]) -> dict[str, float]:
    """What they counted since the last call, added up over verifiers and ranks. All ranks must ask."""
    from tempo_engine import parallel

    counts: Counter[str] = Counter()
    for verifier in verifiers:
        counts.update(verifier.metrics())
    return parallel.sum_metrics(counts, {})[0]
