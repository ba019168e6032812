"""Named methods: presets over the switches of one loop. A recipe picks one with `method: NAME`."""

from typing import Any


def _voting(posterior: str, **em: Any) -> dict[str, Any]:
    """Methods that reward a response by the other responses of its group: no critic, no labelled rollouts, GRPO's advantage."""
    return {
        "em": {"posterior": posterior, "labelled_share": 0.0, "train_policy_on_labelled": False, **em},
        "estep": {"every": 0},
        "mstep": {"baseline": "group_mean", "normalise": "group_std"},
    }


# Labelled prompts only, and no critic: GRPO's advantage over groups of eight.
_GRPO: dict[str, Any] = {
    "em": {"posterior": "label", "labelled_share": 1.0, "labelled_group_size": 8},
    "estep": {"every": 0},
    "mstep": {"loss": "ppo", "clip_low": 0.2, "clip_high": 0.2, "baseline": "group_mean", "normalise": "group_std"},
}
_ON_LABELS: dict[str, Any] = {"em": {"posterior": "label", "labelled_share": 1.0}}

# What each method is in words, and the switches it sets. The share of labelled rollouts belongs to the method, so that every
# method samples em.rollouts responses an iteration.
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    "tempo": ("recalibrated critic rewards unlabelled responses; labelled rows join the M-step", {}),
    "tempo_pure": (
        "Algorithm 1 of the paper: the policy never sees a label",
        {"em": {"train_policy_on_labelled": False}},
    ),
    "tempo_released": (
        "the authors' code: values of before the E-step, targets of -1 and 1, one whitening for the mixed batch",
        {
            "critic": {"target": "plus_minus_one"},
            "em": {
                "order": "lagged",
                "terminal": "last_prefix",
                "clamp": False,
                "group_size": 8,
                "labelled_group_size": 8,
            },
            "estep": {
                "epochs": 1,
                "minibatches": 4,
                "filter": "zero_variance",
                "clip": "sequence_mean",
                "clip_range": 0.1,
                "optim": {"lr": 1e-6, "weight_decay": 0.01},
            },
            "mstep": {
                "loss": "gspo",
                "clip_low": 3e-4,
                "clip_high": 5e-4,
                "aggregate": "sequence_mean",
                "minibatches": 4,
                "normalise": "whiten",
                "optim": {"lr": 1e-6},
            },
        },
    ),
    "tempo_seq": (
        "the critic as reward model: its terminal value against the mean and deviation of the group",
        {"em": {"labelled_group_size": 8}, "mstep": {"baseline": "group_mean", "normalise": "group_std"}},
    ),
    "exact_em": (
        "each response weighs its share of its group's terminal values, the posterior of an exact E-step",
        {"em": {"labelled_group_size": 8}, "mstep": {"baseline": "group_mean", "normalise": "self_normalise"}},
    ),
    "frozen_critic": (
        "tempo without its E-step: the critic of the initialisation is never recalibrated",
        {"em": {"posterior": "frozen_critic"}, "estep": {"every": 0}},
    ),
    "rlvr": (
        "reinforcement learning on labelled prompts only: PPO with the token critic",
        {**_ON_LABELS, "mstep": {"loss": "ppo", "clip_low": 0.2, "clip_high": 0.2, "aggregate": "token_mean"}},
    ),
    "supervised_continuation": ("tempo with labelled prompts only, so that nothing but the data differs", _ON_LABELS),
    "grpo": ("labelled prompts only, outcomes against the mean and deviation of the group (arXiv 2402.03300)", _GRPO),
    "dapo": (
        "grpo with a higher upper clip, groups without signal replaced, and the mean over tokens (arXiv 2503.14476)",
        {
            **_GRPO,
            "estep": {"every": 0, "filter": "zero_variance"},
            "mstep": {**_GRPO["mstep"], "clip_high": 0.28, "aggregate": "token_mean"},
        },
    ),
    "ttrl": ("majority vote among a prompt's own responses (arXiv 2504.16084)", _voting("majority_vote")),
    "empo": (
        "share of a prompt's responses with the same answer (arXiv 2504.05812)",
        _voting("cluster_frequency"),
    ),
    "empo_band": (
        "empo on the prompts whose answers neither all agree nor all differ, its entropy band",
        _voting("cluster_frequency", entropy_band=[0.0, 1.0]),
    ),
    "oracle": (
        "tempo with the hidden answers of unlabelled questions as outcome: an upper bound, not a method",
        {"em": {"posterior": "oracle"}},
    ),
}
