"""The hand-off types between prompts, samplers and updates. Labels live in `Labelled` and nowhere else."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question, ready for a model: Prompt(id="9f2c...", text="3 5 = (8)", token_ids=(5, 9, 2, 30)).

    `id` is a hash of the content, so the same question has the same id in every source. A Prompt has no answer: unlabelled
    questions reach training code as Prompts only.
    """

    id: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A question with every answer that counts as right: Labelled(prompt, answers=frozenset({"+3+5"})).

    `columns` is its row of the data file, for verifiers that read more than answers.
    """

    prompt: Prompt
    answers: frozenset[str]
    columns: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled response: Rollout(prompt, response_ids=[7, 2], logprobs=[-0.1, -1.3], versions=((12, 2),), ...).

    `response_ids` ends with the end-of-sequence token unless `is_truncated`. `logprobs` are those of the sampled tokens under
    the sampling distribution, `text` is the decoded response. `versions` names the weights that sampled it: ((12, 40), (13, 100))
    are version 12 for the first 40 tokens and 13 for the other 60.
    """

    prompt: Prompt
    response_ids: list[int]
    logprobs: list[float]
    versions: tuple[tuple[int, int], ...]
    is_truncated: bool
    text: str

    @property
    def oldest_version(self) -> int:
        return min(version for version, _ in self.versions)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Rollout":
        prompt = fields["prompt"]
        whole: dict[str, Any] = fields | {
            "prompt": Prompt(**prompt | {"token_ids": tuple(prompt["token_ids"])}),
            "versions": tuple((version, end) for version, end in fields["versions"]),
        }
        return Rollout(**whole)


def response_names(prompts: Sequence[Prompt], group_size: int, occasion: str) -> list[str]:
    """A name for each of a group's responses, the same wherever and with whatever others it is sampled: its draws begin with it."""
    occurrence: Counter[str] = Counter()
    names = []
    for prompt in prompts:
        for _ in range(group_size):
            names.append(f"{occasion}/{prompt.id}/{occurrence[prompt.id]}")
            occurrence[prompt.id] += 1
    return names


def response_limits(limits: Sequence[int] | None, count: int, most: int) -> list[int]:
    """Most tokens of each response: `most`, or less where `limits` says so."""
    return [min(n, most) for n in limits or [most] * count]
