"""Where responses come from: one protocol for the in-process sampler and for servers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tempo_engine.model import Policy
from tempo_engine.rollout import Prompt, Rollout


class Sampler(Protocol):
    """Samples groups of responses from the policy it was last given.

    `num_responses` and `num_tokens` count everything sampled so far, kept or not.
    """

    num_responses: int
    num_tokens: int

    def open(self, folder: Path, policy: Policy) -> None:
        """Start whatever samples policies of this shape; what it writes goes into the folder. Returns at once."""
        ...

    def close(self) -> None:
        """Stop it."""
        ...

    def load(self, policy: Policy) -> None:
        """Sample from this policy from now on; rollouts carry its version."""
        ...

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, *, key: str, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        """`group_size` responses to each prompt, those of one prompt next to each other.

        `limits` bounds the tokens of single responses below those of all. `key` names the occasion ("em/12", "eval/12"): together
        with the run's seed, the prompt and the sample's number it fixes the random draws.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What is worth knowing since the last call, by metric name."""
        ...
