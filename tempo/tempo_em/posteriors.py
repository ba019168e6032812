"""Who says how good an unlabelled response is. Each posterior gives one outcome per response; none of them sees a label.

In the EM reading the outcome is w(x, y) in q(y | x) ~ w(x, y) pi(y | x): correctness is latent, and these are the beliefs about it.
"""

# Shape letters: S = sequences
import random
from collections import Counter
from collections.abc import Sequence

import torch
from tempo_engine.metrics import modes
from torch import Tensor


def critic(terminal_S: Tensor, target: tuple[float, float]) -> Tensor:
    """TEMPO: the critic's terminal value V(x, y_T), clamped to the range of its targets (arXiv 2604.19295, eq. 10)."""
    return terminal_S.clamp(*target)


def majority_vote(answers: Sequence[Sequence[str | None]]) -> Tensor:
    """TTRL: 1 for responses with the most frequent answer of their group, else 0 (arXiv 2504.16084, section 2.2).

    Responses without an answer do not vote and get 0. When answers tie, the first in alphabetical order is the pseudo-label: a
    rule that does not depend on the order of the responses.
    """
    outcomes = []
    for group in answers:
        label = min(modes(group), default=None)
        outcomes += [float(label is not None and answer == label) for answer in group]
    return torch.tensor(outcomes)


def cluster_frequency(answers: Sequence[Sequence[str | None]]) -> Tensor:
    """EMPO: the share |c| / G of a response's group that has the same answer (arXiv 2504.05812, eq. 5), without its entropy band.

    A response without an answer gets 0.
    """
    outcomes = []
    for group in answers:
        count = Counter(group)
        outcomes += [0.0 if answer is None else count[answer] / len(group) for answer in group]
    return torch.tensor(outcomes)


def coin_flip(num_responses: int, seed: str) -> Tensor:
    """A control: outcomes that know nothing."""
    rng = random.Random(seed)
    return torch.tensor([float(rng.random() < 0.5) for _ in range(num_responses)])
