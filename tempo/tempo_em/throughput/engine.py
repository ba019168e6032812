"""The engine's step: its sampler, its updates, the kernels' advantages."""

# Shape letters: T = packed response tokens, S = sequences, TS = T + S values
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from tempo_engine import parallel
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import PackedBatch, pack
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.samplers import Sampler
from tempo_engine.samplers.local import LocalSampler
from tempo_engine.samplers.sglang import SGLangOptions, SGLangSampler
from tempo_engine.sglang.fleet import Patience
from tempo_engine.sglang.server import ServerOptions
from tempo_engine.updates import CriticUpdate, PolicyUpdate, fit_critic, improve_policy
from tempo_engine.weights import DTYPES
from tempo_kernels import advantage, group_advantage, whiten
from tempo_kernels.segments import segment_ids
from torch import Tensor

from tempo_em.servers import own_gpus
from tempo_em.throughput.turns import Facts, Turns
from tempo_em.throughput.work import (
    CLIP,
    CLIP_HIGH,
    CLIP_LOW,
    GPU_SHARE,
    GROUP_EPS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    VALUE_CLIP,
    Case,
    label,
    reward,
)  # fmt: skip


def run(case: Case, turns: Turns, *, given: bool = False) -> dict[str, Tensor]:
    """Steps until the turns end; returns AdamW's first moments by parameter, under the names of a plain model's."""
    sharding = Sharding(compute=DTYPES[case.dtype])
    model = case.load_model().to(case.device)  # pyright: ignore[reportArgumentType]
    policy = Policy(model, sharding=sharding, device=case.device, share_prompts=True)
    step = grpo if case.method == "grpo" else tempo
    if given:
        return step(case, policy, lambda: given_rollouts(case, policy), turns)
    prompts = [Prompt(str(i), "", tuple(ids)) for i, ids in enumerate(case.prompts)]
    sampler = (local if case.sampler == "local" else servers)(case)

    def get() -> list[Rollout]:
        with turns.generation():
            sampler.load(policy)
            return sampler.sample(prompts, case.group_size, key=str(turns.count), limits=case.lengths)

    with tempfile.TemporaryDirectory() as folder:
        sampler.open(Path(folder), policy)
        try:
            return step(case, policy, get, turns)
        finally:
            sampler.close()


def local(case: Case) -> Sampler:
    """No token ends a response: it ends at its planned length."""
    return LocalSampler(stop_ids=[-1], decode=decoding(case), max_new_tokens=case.longest)


def servers(case: Case) -> Sampler:
    """SGLang, on the trainer's GPU where there is one: there it gives its memory back between batches, and samples in bfloat16,
    which its kernels for GPUs are made for."""
    has_gpu = torch.cuda.is_available()
    server = ServerOptions(
        dtype="bfloat16" if has_gpu else case.dtype, max_running=case.num_rows,
        context_length=case.prompt_tokens + case.longest, saves_memory=has_gpu, gpus=own_gpus(),
        memory_fraction=GPU_SHARE if has_gpu else None,
        arguments={"attention_backend": "triton"} if has_gpu else {},  # not every other one has heads of 32
    )  # fmt: skip
    options = SGLangOptions(
        server=server, patience=Patience(), sync="tensor" if has_gpu else "disk", verify="off", naps=has_gpu
    )
    return SGLangSampler(options, stop_ids=[], decode=decoding(case), max_new_tokens=case.longest)


def decoding(case: Case) -> Callable[[list[int]], str]:
    return cast(Callable[[list[int]], str], case.tokenizer().decode)


def given_rollouts(case: Case, policy: Policy) -> list[Rollout]:
    """With the log-probs that the policy itself has for them."""
    prompts = [Prompt(str(i), "", tuple(ids)) for i, ids in enumerate(case.prompts)]
    blank = [
        Rollout(prompts[row // case.group_size], ids, [0.0] * len(ids), ((0, len(ids)),), False, "")
        for row, ids in enumerate(case.given)
    ]
    batch = pack(blank, policy.device)
    logprobs = policy.token_logprobs(batch, case.micro_batch_tokens).split(case.lengths)
    return [
        Rollout(r.prompt, r.response_ids, x_T.tolist(), r.versions, False, "")
        for r, x_T in zip(blank, logprobs, strict=True)
    ]


def facts(rollouts: list[Rollout], batch: PackedBatch, updates: int, loss: float, norm: float) -> Facts:
    rows = [(r.prompt.token_ids, len(r.response_ids)) for r in rollouts]
    return Facts(rows, sum(n for _, n in rows), int(batch.cu_responses_S1[-1]), updates, loss, norm)


def grpo(case: Case, policy: Policy, get: Callable[[], list[Rollout]], turns: Turns) -> dict[str, Tensor]:
    """One update on the sampler's own log-probs, as TRL does: with one update a step they are the policy's."""
    optimizer = Optimizer(policy.parameters(), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    how = PolicyUpdate(
        loss="ppo", epochs=1, minibatches=1, micro_batch_tokens=case.micro_batch_tokens, clip_low=CLIP, clip_high=CLIP
    )
    group_S = case.group_of_row.to(policy.device)
    while turns.go():
        rollouts = get()
        batch = pack(rollouts, policy.device)
        reward_S = torch.tensor([reward(r.response_ids) for r in rollouts], device=policy.device)
        advantage_S = group_advantage(reward_S, group_S, divide_by_std=True, eps=GROUP_EPS)
        metrics = improve_policy(
            policy, optimizer, batch, advantage_S[segment_ids(batch.cu_responses_S1)], how,
            old_logprob_T=batch.sampler_logprob_T, seed=turns.count,
        )  # fmt: skip
        numbers = (1, metrics["actor/pg_loss"], metrics["actor/grad_norm"])
        turns.done(lambda rollouts=rollouts, batch=batch, numbers=numbers: facts(rollouts, batch, *numbers))
    return moments(optimizer)


def tempo(case: Case, policy: Policy, get: Callable[[], list[Rollout]], turns: Turns) -> dict[str, Tensor]:
    """One iteration of `tempo_released` with one minibatch and no filter: values of before the E-step, V before the last token as
    outcome where there is no label, one whitening for all tokens, the value clip by sequence, GSPO."""
    critic = Critic(policy, backbone="separate", kind="linear", terminal="last_prefix")
    parallel.assign(critic.head.weight.detach(), case.value_head.to(policy.device))
    budget = case.micro_batch_tokens
    optimizers = {
        name: Optimizer(model.parameters(), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
        for name, model in (("policy", policy), ("critic", critic))
    }
    fit = CriticUpdate(
        epochs=1, minibatches=1, micro_batch_tokens=budget, clip="sequence_mean", clip_range=VALUE_CLIP,
        target_range=(-1.0, 1.0),
    )  # fmt: skip
    improve = PolicyUpdate(
        loss="gspo", epochs=1, minibatches=1, micro_batch_tokens=budget, clip_low=CLIP_LOW, clip_high=CLIP_HIGH
    )
    is_labelled_S = case.is_labelled_row.to(policy.device)
    labelled = is_labelled_S.nonzero()[:, 0]
    while turns.go():
        rollouts = get()
        batch = pack(rollouts, policy.device)
        label_S = torch.tensor([label(r.response_ids) for r in rollouts], device=policy.device)
        old_logprob_T = policy.token_logprobs(batch, budget)
        value_TS = critic.values(batch, budget)
        outcome_S = torch.where(is_labelled_S, label_S, critic.terminal_values(value_TS, batch))
        advantage_T = advantage(outcome_S, value_TS, batch.cu_responses_S1)
        advantage_T = whiten(advantage_T, torch.zeros_like(advantage_T, dtype=torch.int64))
        fit_critic(
            critic, optimizers["critic"], batch.select(labelled), label_S[labelled], fit, seed=turns.count
        )  # fmt: skip
        metrics = improve_policy(
            policy, optimizers["policy"], batch, advantage_T, improve, old_logprob_T=old_logprob_T, seed=turns.count
        )
        numbers = (2, metrics["actor/pg_loss"], metrics["actor/grad_norm"])
        turns.done(lambda rollouts=rollouts, batch=batch, numbers=numbers: facts(rollouts, batch, *numbers))
    return {f"{name}.{k}": x for name, one in optimizers.items() for k, x in moments(one).items()}


def moments(optimizer: Optimizer) -> dict[str, Tensor]:
    parts = {"trunk": "model", "head": "score"}  # of a critic, as AutoModelForTokenClassification calls them
    found = {name: parallel.whole(optimizer.adamw.state[p]["exp_avg"]) for name, p in optimizer.named.items()}
    return {
        ".".join([parts.get(first, first), *rest]): x
        for (first, *rest), x in ((k.split("."), x) for k, x in found.items())
    }
