"""Who says how good an unlabelled response is. Each posterior gives one outcome per response; none but the oracle sees a label.

In the EM reading the outcome is w(x, y) in q(y | x) ~ w(x, y) pi(y | x): correctness is latent, and these are the beliefs about it.
"""

# Shape letters: S = sequences
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tempo_engine.metrics import modes
from tempo_engine.rollout import Labelled
from tempo_engine.verify import Verifier
from torch import Tensor


@dataclass(frozen=True)
class Oracle:
    """The answers of D_U by the ids of its prompts, and who compares them: an upper bound, not a method.

    This type is the only way on which they can reach training. It is made for posterior oracle and for nothing else; under every
    other posterior the loop holds None, and prompts without answers.
    """

    items: Mapping[str, Labelled]
    verifier: Verifier


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


def denoised(reward_S: Tensor, rate: float) -> Tensor:
    """(I - rate) / (1 - 2 rate): when verdicts I in {0, 1} are turned round at this rate, its mean is that of the true ones, and a
    regression on it has the same minimum (Natarajan et al. 2013, "Learning with noisy labels")."""
    return (reward_S - rate) / (1 - 2 * rate) if rate else reward_S


def is_mislabelled(prompt_id: str, rate: float, seed: int) -> bool:
    """Whether a question is among those whose verdicts are turned round: the same ones throughout a run."""
    return random.Random(f"{seed}/label_noise/{prompt_id}").random() < rate


def answer_entropy(answers: Sequence[str | None]) -> float:
    """Entropy of a group's clusters of answers, -sum_c p(c) log p(c) with p(c) = |c| / G, as a share of log G: 0 when all answers
    agree, 1 when none do (arXiv 2504.05812, eq. 4).

    A response without an answer agrees with no other. A group of one has 0.
    """
    counts = Counter(answer for answer in answers if answer is not None)
    sizes = [*counts.values(), *[1] * answers.count(None)]
    if len(answers) < 2 or len(sizes) == 1:
        return 0.0
    if len(sizes) == len(answers):
        return 1.0
    return -sum(n / len(answers) * math.log(n / len(answers)) for n in sizes) / math.log(len(answers))


def coin_flip(num_responses: int, seed: str) -> Tensor:
    """A control: outcomes that know nothing."""
    rng = random.Random(seed)
    return torch.tensor([float(rng.random() < 0.5) for _ in range(num_responses)])
