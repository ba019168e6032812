import collections
from collections.abc import Callable

import pytest
import torch
from tempo_engine.model import Policy
from tempo_engine.packing import pack
from tempo_engine.rollout import Prompt
from tempo_engine.samplers.local import LocalSampler, draw, truncate

MakePolicy = Callable[..., Policy]


def prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(f"p{i}", "", tuple((i + t) % 38 + 2 for t in range(n))) for i, n in enumerate(lengths)]


def sampler_for(policy: Policy, **settings: object) -> LocalSampler:
    options = {"stop_ids": [1], "decode": str, "max_new_tokens": 24, **settings}
    sampler = LocalSampler(**options)  # pyright: ignore[reportArgumentType]
    sampler.load(policy)
    return sampler


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo3", "gemma2"])
def test_sampled_log_probs_agree_with_a_full_forward(make_policy: MakePolicy, model_type: str) -> None:
    policy = make_policy(model_type)
    policy.temperature = 0.8
    rollouts = sampler_for(policy, temperature=0.8, max_running=8).sample(prompts(3, 7, 5, 2, 9), 4, key="k")
    batch = pack(rollouts)
    assert torch.allclose(policy.token_stats(batch).logprob_T, batch.sampler_logprob_T, atol=1e-4)


def test_a_response_does_not_depend_on_which_others_share_its_batch(make_policy: MakePolicy) -> None:
    policy = make_policy()
    questions = prompts(3, 7, 5, 2, 9, 4)
    together = sampler_for(policy).sample(questions, 4, key="k")
    narrow = sampler_for(policy, max_running=5).sample(questions, 4, key="k")
    alone = [r for q in questions for r in sampler_for(policy).sample([q], 4, key="k")]
    assert [r.response_ids for r in together] == [r.response_ids for r in narrow] == [r.response_ids for r in alone]


def test_seed_key_and_prompt_decide_the_draws(make_policy: MakePolicy) -> None:
    policy, questions = make_policy(), prompts(3, 5)
    ids = [r.response_ids for r in sampler_for(policy).sample(questions, 3, key="a")]
    assert ids == [r.response_ids for r in sampler_for(policy).sample(questions, 3, key="a")]
    assert ids != [r.response_ids for r in sampler_for(policy).sample(questions, 3, key="b")]
    assert ids != [r.response_ids for r in sampler_for(policy, seed=1).sample(questions, 3, key="a")]
    assert len({tuple(i) for i in ids}) > 1


def test_the_same_prompt_twice_in_a_batch_gets_other_samples(make_policy: MakePolicy) -> None:
    question = prompts(4)[0]
    first, second = sampler_for(make_policy()).sample([question, question], 1, key="k")
    assert first.response_ids != second.response_ids


def test_responses_end_at_the_stop_token_or_are_marked_truncated(make_policy: MakePolicy) -> None:
    rollouts = sampler_for(make_policy(), max_new_tokens=12).sample(prompts(*[4] * 40), 4, key="k")
    assert {r.is_truncated for r in rollouts} == {True, False}
    for r in rollouts:
        assert 1 not in r.response_ids[:-1]
        assert r.is_truncated == (r.response_ids[-1] != 1)
        assert len(r.response_ids) == 12 if r.is_truncated else len(r.response_ids) <= 12
        assert len(r.logprobs) == len(r.response_ids)


def test_tokens_are_drawn_with_the_models_probabilities(make_policy: MakePolicy) -> None:
    policy, question = make_policy(), prompts(5)[0]
    probability = policy.model(input_ids=torch.tensor([question.token_ids])).logits[0, -1].double().softmax(-1)
    count = 6000
    first = collections.Counter(
        r.response_ids[0] for r in sampler_for(policy, max_new_tokens=1).sample([question], count, key="k")
    )
    for token, p in enumerate(probability.tolist()):
        deviation = abs(first[token] / count - p)
        assert deviation < 5 * (p * (1 - p) / count) ** 0.5 + 1e-3


def test_every_rollout_carries_the_version_that_sampled_it(make_policy: MakePolicy) -> None:
    policy = make_policy()
    policy.version = 7
    sampler = sampler_for(policy)
    assert {r.oldest_version for r in sampler.sample(prompts(3), 2, key="k")} == {7}
    policy.version = 8
    with pytest.raises(RuntimeError, match="load"):
        sampler.sample(prompts(3), 2, key="k")


def test_sampling_without_a_policy_is_refused() -> None:
    with pytest.raises(RuntimeError, match="load"):
        LocalSampler(stop_ids=[1], decode=str, max_new_tokens=4).sample(prompts(3), 1, key="k")


def test_limits_bound_single_responses(make_policy: MakePolicy) -> None:
    rollouts = sampler_for(make_policy(), stop_ids=[-1]).sample(prompts(3, 3), 2, key="k", limits=[1, 5, 24, 99])
    assert [len(r.response_ids) for r in rollouts] == [1, 5, 24, 24]


def test_top_k_and_top_p_keep_the_likely_tokens() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert truncate(logits, 1.0, 2).isfinite().tolist() == [[True, True, False, False]]
    assert truncate(logits, 0.6, 0).isfinite().tolist() == [[True, True, False, False]]
    assert truncate(logits, 0.3, 0).isfinite().tolist() == [[True, False, False, False]]
    assert truncate(logits, 1.0, 0) is logits


def test_draw_inverts_the_cumulative_distribution() -> None:
    logits = torch.tensor([0.25, 0.5, 0.25]).log().expand(4, 3)
    token, logprob = draw(logits, torch.tensor([0.0, 0.2, 0.3, 0.999], dtype=torch.float64))
    assert token.tolist() == [0, 0, 1, 2]
    assert torch.allclose(logprob.exp(), torch.tensor([0.25, 0.25, 0.5, 0.25]))


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3)
    token, _ = draw(logits, torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64))
    assert token.tolist() == [1, 1, 1]
