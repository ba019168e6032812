"""Recipe -> the parts of a run. Everything a user can get wrong is found here, before a run folder exists."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tempo_engine import parallel
from tempo_engine.adapters import Lora
from tempo_engine.blocks import BlockOptions
from tempo_engine.cursor import Cursor
from tempo_engine.errors import UserError, first_sentence
from tempo_engine.evaluate import EvaluationSet
from tempo_engine.export import restore_critic
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer, schedule_factor
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Labelled, Prompt
from tempo_engine.samplers import Sampler
from tempo_engine.samplers.local import LocalSampler
from tempo_engine.samplers.sglang import SGLangSampler
from tempo_engine.tokenizer import decoder, load_tokenizer, single_token
from tempo_engine.tracking import Clock
from tempo_engine.updates import CriticUpdate, PolicyUpdate
from tempo_engine.verify import Verifier
from tempo_engine.verify.functions import RewardFunction
from tempo_engine.weights import (
    DTYPES,
    blank_causal_lm,
    create_causal_lm,
    is_blank,
    load_causal_lm,
    require_model_directory,
)

from tempo_em.cold_start import ColdStart
from tempo_em.datasets import Dataset, load_datasets, make_prompts, tokenizer_for
from tempo_em.posteriors import Oracle
from tempo_em.recipe import OptimRecipe, Recipe
from tempo_em.schedule import EMLoop, Stage
from tempo_em.servers import check_servers, sglang_options
from tempo_em.sources import sources_of, style_of


@dataclass
class Parts:
    """Everything a run consists of."""

    loop: EMLoop
    stages: list[Stage]
    cold_start: ColdStart | None
    evaluation_sets: list[EvaluationSet]
    tokenizer: Any
    datasets: dict[str, Dataset]

    @property
    def verifiers(self) -> list[Verifier]:
        return [dataset.verifier for dataset in self.datasets.values()]

    @property
    def notes(self) -> list[str]:
        """What the user is told of how rewards are come by."""
        return sorted({v.note for v in self.verifiers if isinstance(v, RewardFunction)})


def build(recipe: Recipe) -> Parts:
    """Load data, tokenizer and models and join them. Raises UserError with one sentence for anything that cannot work."""
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = parallel.start(timeout_minutes=recipe.parallel.timeout_minutes)
    for path in filter(None, (recipe.model.path, recipe.critic.path)):
        require_model_directory(path)
    datasets = load_datasets(recipe)
    tokenizer = load_tokenizer(recipe.model.path) if recipe.model.path else tokenizer_for(datasets)

    limit = recipe.rollout.max_prompt_tokens
    sources = sources_of(recipe.data)
    prompts: dict[str, list[Prompt]] = {}
    for name, dataset in datasets.items():
        style = style_of(recipe.data, sources[name])
        prompts[name], datasets[name] = make_prompts(dataset, style, tokenizer, limit, f"data.{name}")

    def with_answers(name: str) -> list[Labelled]:
        pairs = zip(prompts[name], datasets[name].questions, strict=True)
        return [Labelled(prompt, question.answers, question.columns) for prompt, question in pairs]

    policy = _policy(recipe, tokenizer, device)
    critic = None
    if recipe.uses_critic:
        critic = Critic(
            policy,
            backbone=recipe.critic.backbone,
            kind=recipe.critic.head,
            terminal=recipe.em.terminal,
            heads=recipe.critic.heads,
        )
        if recipe.critic.path:
            restore_critic(critic, recipe.critic.path)
    sampler = _sampler(recipe, policy, tokenizer)
    loop = EMLoop(
        recipe=recipe,
        policy=policy,
        critic=critic,
        reference=policy.frozen_copy() if recipe.mstep.kl_coef else None,
        sampler=sampler,
        labelled=Cursor(with_answers("labelled"), seed=f"{recipe.seed}/labelled"),
        unlabelled=Cursor(prompts["unlabelled"], seed=f"{recipe.loop_seed}/unlabelled"),
        verifier=datasets["labelled"].verifier,
        extract_unlabelled=datasets["unlabelled"].verifier.extract,
        policy_optimizer=_optimizer(policy.parameters(), recipe.mstep.optim, _policy_steps(recipe)),
        critic_optimizer=None
        if critic is None
        else _optimizer(critic.parameters(), recipe.estep.optim, _critic_steps(recipe)),
        policy_update=_policy_update(recipe),
        critic_update=_critic_update(recipe),
        clock=Clock(),
        frozen_critic=critic.frozen_copy() if critic and recipe.keeps_frozen_critic else None,
        oracle=_oracle(datasets["unlabelled"], with_answers("unlabelled")) if recipe.em.posterior == "oracle" else None,
    )
    audited = [name for name in datasets if name != "labelled" and datasets[name].unanswered is None]
    sets = [
        EvaluationSet(name.removeprefix("evaluation."), with_answers(name), datasets[name].verifier) for name in audited
    ]
    return Parts(loop, stages_of(recipe), _cold_start(recipe, datasets, loop, tokenizer), sets, tokenizer, datasets)


def stages_of(recipe: Recipe) -> list[Stage]:
    """Critic warm-up and RLVR are the EM iteration on labelled prompts only, without and with the policy update."""
    on_labels = Stage(
        "rlvr",
        recipe.initialisation.rlvr,
        labelled_share=1.0,
        posterior="label",
        improves_policy=True,
        trains_on_labelled=True,
        recalibrates_every=1,
        baseline="critic_prefix",
        normalise="whiten_per_population",
    )
    em = recipe.em
    return [
        replace(on_labels, name="critic_warmup", iterations=recipe.initialisation.critic_warmup, improves_policy=False),
        on_labels,
        Stage(
            "em",
            em.iterations,
            labelled_share=em.labelled_share,
            posterior=em.posterior,
            improves_policy=True,
            trains_on_labelled=em.train_policy_on_labelled,
            recalibrates_every=recipe.estep.every,
            baseline=recipe.mstep.baseline,
            normalise=recipe.mstep.normalise,
            is_watched=recipe.estep.adaptive.is_on or recipe.mstep.gate.is_on,
        ),
    ]


def _oracle(unlabelled: Dataset, items: list[Labelled]) -> Oracle:
    """What no other posterior gets: the answers of the unlabelled questions."""
    if unanswered := unlabelled.unanswered:
        raise UserError(
            f"posterior oracle trains on the answers of data.unlabelled, but {str(unanswered.content)[:60]!r} has none; "
            "choose another em.posterior"
        )
    return Oracle({item.prompt.id: item for item in items}, unlabelled.verifier)


def _policy(recipe: Recipe, tokenizer: Any, device: torch.device) -> Policy:
    how, spread = recipe.model, recipe.parallel
    sharding = Sharding(
        compute=DTYPES[how.dtype],
        replicas=spread.replicas,
        reshard_after_forward=spread.reshard_after_forward,
        accumulate=spread.accumulate,
        offload=spread.offload,
    )
    lora = how.lora and Lora(rank=how.lora.rank, alpha=how.lora.alpha, targets=how.lora.targets, seed=recipe.seed)
    blocks = BlockOptions(activation_checkpointing=how.activation_checkpointing, compile=how.compile, lora=lora)
    options: dict[str, Any] = {"dtype": sharding.storage, "attention": how.attention}
    if how.path:
        open_model = blank_causal_lm if sharding.is_needed else load_causal_lm
        model = open_model(how.path, **options)
    else:
        assert how.create is not None
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        config = {"vocab_size": len(tokenizer), **ids, **how.create}
        if config["vocab_size"] < len(tokenizer):
            raise UserError(
                f"model.create.vocab_size is {config['vocab_size']}, the tokenizer has {len(tokenizer)} tokens; leave it out"
            )
        model = create_causal_lm(config, **options, seed=recipe.seed)
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = recipe.rollout.max_prompt_tokens + recipe.rollout.max_new_tokens
    if limit is not None and longest > limit:
        raise UserError(
            f"rollout.max_prompt_tokens + max_new_tokens is {longest}, but the model takes {limit} positions; lower one of them"
        )
    try:
        return Policy(
            model if is_blank(model) else model.to(device),  # pyright: ignore[reportArgumentType]
            temperature=recipe.rollout.temperature,
            sharding=sharding,
            blocks=blocks,
            device=device,
            weights=how.path if is_blank(model) else None,
            share_prompts=how.share_prompts,
        )
    except RuntimeError as error:
        raise UserError(f"the model cannot run: {first_sentence(error)}; check the sizes in its config") from error


def _sampler(recipe: Recipe, policy: Policy, tokenizer: Any) -> Sampler:
    how = recipe.rollout
    options: dict[str, Any] = {
        "stop_ids": stop_ids(policy, tokenizer, how.stop), "decode": decoder(tokenizer), "max_new_tokens": how.max_new_tokens,
        "temperature": how.temperature, "top_p": how.top_p, "top_k": how.top_k, "seed": recipe.loop_seed,
    }  # fmt: skip
    if how.backend == "local":
        return LocalSampler(**options, max_running=how.max_running)
    servers = sglang_options(recipe, policy)
    parallel.from_main(lambda: check_servers(servers, how.sglang.allowed_hosts))
    return SGLangSampler(servers, **options)


def stop_ids(policy: Policy, tokenizer: Any, stop: Sequence[str] = ()) -> list[int]:
    """Tokens that end a response: those of the model's generation config, the tokenizer's end of sequence, and those of `stop`."""
    configured = getattr(policy.model.generation_config, "eos_token_id", None)
    ids = set(configured if isinstance(configured, list) else [configured]) | {tokenizer.eos_token_id}
    found = sorted(i for i in ids if i is not None)
    if not found:
        raise UserError("neither the model's generation config nor its tokenizer names an end-of-sequence token")
    return sorted({*found, *(single_token(tokenizer, text) for text in stop)})


def _optimizer(parameters: Any, how: OptimRecipe, total_steps: int) -> Optimizer:
    return Optimizer(
        parameters,
        lr=how.lr,
        weight_decay=how.weight_decay,
        betas=how.betas,
        max_grad_norm=how.max_grad_norm,
        max_skipped=how.max_skipped,
        factor=lambda step: schedule_factor(step, warmup=how.warmup_steps, schedule=how.schedule, total=total_steps),
    )


def _policy_update(recipe: Recipe) -> PolicyUpdate:
    how = recipe.mstep
    return PolicyUpdate(
        loss=how.loss,
        epochs=how.epochs,
        minibatches=how.minibatches,
        micro_batch_tokens=recipe.micro_batch_tokens,
        clip_low=how.clip_low,
        clip_high=how.clip_high,
        dual_clip=how.dual_clip,
        aggregate=how.aggregate,
        denominator=recipe.rollout.max_new_tokens if how.aggregate == "fixed_denominator" else None,
        entropy_coef=how.entropy_coef,
        kl_coef=how.kl_coef,
        kl=how.kl,
        importance=how.importance,
        importance_cap=how.importance_cap,
    )


def _critic_update(recipe: Recipe) -> CriticUpdate:
    how = recipe.estep
    return CriticUpdate(
        epochs=how.epochs,
        minibatches=how.minibatches,
        micro_batch_tokens=recipe.micro_batch_tokens,
        loss=recipe.critic.loss,
        clip=how.clip,
        clip_range=how.clip_range,
        target_range=recipe.critic.target_range,
    )


def _policy_steps(recipe: Recipe) -> int:
    return (recipe.initialisation.rlvr + recipe.em.iterations) * recipe.mstep.epochs * recipe.mstep.minibatches


def _critic_steps(recipe: Recipe) -> int:
    longest = 1 if recipe.estep.adaptive.is_on or recipe.mstep.gate.is_on else recipe.estep.every
    em = -(-recipe.em.iterations // longest) if recipe.estep.every else 0
    fits = recipe.initialisation.critic_warmup + recipe.initialisation.rlvr + em
    return fits * recipe.estep.epochs * recipe.estep.minibatches


def _cold_start(recipe: Recipe, datasets: dict[str, Dataset], loop: EMLoop, tokenizer: Any) -> ColdStart | None:
    how = recipe.cold_start
    if not how.steps:
        return None
    generator = how.task.make() if how.task else datasets["labelled"].generator
    if generator is None:
        raise UserError(
            "cold_start.steps needs worked responses, which only generators write; data.labelled is a file: set cold_start.task "
            "or set steps to 0"
        )
    unknown = set(how.mix) - set(generator.trace_kinds)
    if unknown:
        kinds = ", ".join(generator.trace_kinds)
        raise UserError(f"cold_start.mix has {', '.join(sorted(unknown))}; this generator writes {kinds}")
    words = generator.vocabulary() or []
    strange = [w for w in words if tokenizer.unk_token_id in tokenizer(w, add_special_tokens=False)["input_ids"]]
    if strange:
        raise UserError(
            f"{'cold_start.task' if how.task else 'data.labelled'} has words that the tokenizer does not know, such as "
            f"{strange[0]!r}; choose a task of the tokenizer's words"
        )
    optimizer = _optimizer(loop.policy.parameters(), how.optim, how.steps)
    not_to_be_seen = frozenset(q.id for name, d in datasets.items() if name != "labelled" for q in d.questions)
    cold_start = ColdStart(recipe, generator, tokenizer, loop.policy, optimizer, not_to_be_seen)
    longest = int(cold_start.batch(0).response_length_S.max())
    if longest > recipe.rollout.max_new_tokens:
        raise UserError(
            f"cold_start writes responses of {longest} tokens, the limit rollout.max_new_tokens is "
            f"{recipe.rollout.max_new_tokens}; raise it"
        )
    return cold_start
