"""Named methods: presets over the switches of one loop. A recipe picks one with `method: NAME`."""

from typing import Any


def _voting(posterior: str) -> dict[str, Any]:
    """Methods that reward a response by the other responses of its group: no critic, no labelled rollouts, GRPO's advantage."""
    return {
        "em": {"posterior": posterior, "labelled_share": 0.0, "train_policy_on_labelled": False},
        "estep": {"every": 0},
        "mstep": {"baseline": "group_mean", "normalise": "group_std"},
    }


# What each method is in words, and the switches it sets. The share of labelled rollouts belongs to the method, so that every
# method samples em.rollouts responses an iteration.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tempo": ("recalibrated critic rewards unlabelled responses; labelled rows join the M-step", {}),
    "tempo_pure": (
        "Algorithm 1 of the paper: the policy never sees a label",
        {"em": {"train_policy_on_labelled": False}},
    ),
    "frozen_critic": (
        "tempo without its E-step: the critic of the initialisation is never recalibrated",
        {"estep": {"every": 0}},
    ),
    "rlvr": (
        "reinforcement learning on labelled prompts only: PPO with the token critic",
        {"em": {"posterior": "label", "labelled_share": 1.0}},
    ),
    "ttrl": ("majority vote among a prompt's own responses (arXiv 2504.16084)", _voting("majority_vote")),
    "empo": (
        "share of a prompt's responses with the same answer (arXiv 2504.05812)",
        _voting("cluster_frequency"),
    ),
}
