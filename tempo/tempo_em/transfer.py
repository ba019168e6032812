"""Does what labels teach the critic reach the unlabelled questions? A look at one E-step that needs no hidden answer.

Where labels determine the critic, an E-step changes its judgement of responses to unlabelled questions about as much as that of
labelled ones. Where they do not (unlabelled questions of another kind, or longer ones), the same small step that leaves its ranking
of labelled responses in order shuffles the unlabelled ones: what it says of those is a side effect, no outcome to train on.
"""

from collections.abc import Callable, Sequence

from tempo_engine.metrics import correlation
from tempo_engine.rollout import Rollout
from torch import Tensor

KEPT_LABELLED, KEPT_UNLABELLED = "critic/kept_labelled", "critic/kept_unlabelled"
# Responses of each kind: enough for a correlation, little beside an E-step.
MOST = 64


class Transfer:
    """How much of its judgement the critic keeps through an E-step: made before it, asked after it.

    `judge` gives the critic's terminal values of responses, [S].
    """

    def __init__(
        self, judge: Callable[[Sequence[Rollout]], Tensor], labelled: Sequence[Rollout], unlabelled: Sequence[Rollout]
    ) -> None:
        self._judge = judge
        self._labelled, self._unlabelled = spread(labelled, MOST), spread(unlabelled, MOST)
        self._before_S = self._judged()

    def metrics(self) -> dict[str, float]:
        """Correlations of the terminal values before and after, over labelled and over unlabelled responses; NaN where values are
        all the same."""
        pairs = self._before_S.numpy(), self._judged().numpy()
        count = len(self._labelled)
        return {
            KEPT_LABELLED: correlation(*(values_S[:count] for values_S in pairs)),
            KEPT_UNLABELLED: correlation(*(values_S[count:] for values_S in pairs)),
        }

    def _judged(self) -> Tensor:
        return self._judge([*self._labelled, *self._unlabelled]).double().cpu()


def spread(rollouts: Sequence[Rollout], most: int) -> Sequence[Rollout]:
    """At most so many of them, from everywhere: of as many questions as possible."""
    return rollouts[:: -(-len(rollouts) // most)] if rollouts else []
