"""Named methods: presets over the switches of one loop. A recipe picks one with `method: NAME`."""

from typing import Any

# How each method answers: who says how good an unlabelled response is, and against which baseline?
# The share of labelled rollouts belongs to the method, so every method samples em.rollouts responses an iteration.
_VOTING: dict[str, Any] = {
    "em": {"labelled_share": 0.0, "train_policy_on_labelled": False},
    "estep": {"every": 0},
    "mstep": {"baseline": "group_mean", "normalise": "group_std"},
}

PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tempo": ("recalibrated critic rewards unlabelled responses; labelled rows join the M-step", {}),
    "tempo_pure": (
        "Algorithm 1 of the paper: the policy never sees a label",
        {"em": {"train_policy_on_labelled": False}},
    ),
    "frozen_critic": (
        "the critic of the initialisation, never recalibrated (no E-step; policy on unlabelled prompts only)",
        {"em": {"labelled_share": 0.0, "train_policy_on_labelled": False}, "estep": {"every": 0}},
    ),
    "rlvr": (
        "reinforcement learning on labelled prompts only: PPO with the token critic",
        {"em": {"posterior": "label", "labelled_share": 1.0}},
    ),
    "ttrl": ("majority vote of a prompt's own responses (arXiv 2504.16084)", {**_VOTING, "em": {**_VOTING["em"], "posterior": "majority_vote"}}),
    "empo": ("share of a prompt's responses with the same answer (arXiv 2504.05812)", {**_VOTING, "em": {**_VOTING["em"], "posterior": "cluster_frequency"}}),
}  # fmt: skip
