"""Settings that are fine by themselves but make no sense together: each is refused with the reason and a way out."""

from collections.abc import Iterator

from tempo_em.recipe import Recipe
from tempo_em.recipe_data import ColumnsSource


def contradictions(recipe: Recipe) -> Iterator[str]:
    """One sentence for every contradiction in a recipe."""
    yield from _critic(recipe)
    yield from _cadence(recipe)
    yield from _schedule(recipe)
    yield from _rollout(recipe)
    yield from _posterior(recipe)
    yield from _advantage(recipe)
    if recipe.cold_start.steps and (recipe.data.system or recipe.data.chat or recipe.data.enable_thinking is not None):
        yield (
            "cold_start writes responses to plain prompts, but data.system, chat or enable_thinking asks in chat messages; set "
            "cold_start.steps to 0 or remove them"
        )
    mstep = recipe.mstep
    if recipe.model.compile and recipe.model.activation_checkpointing == "selective":
        yield (
            "model.activation_checkpointing selective chooses among operations, of which compiled blocks have none left; "
            "use full or off with model.compile"
        )
    if mstep.importance != "none" and mstep.old_logprob == "sampler":
        yield (
            f"mstep.importance {mstep.importance} corrects for the ratio of mstep.old_logprob to the sampler's "
            "log-probs, which is 1 with old_logprob sampler; set old_logprob to trainer or importance to none"
        )
    if mstep.old_logprob == "sampler" and (recipe.rollout.top_p < 1 or recipe.rollout.top_k > 0):
        yield (
            "with top_p or top_k the sampler's log-probs are those of a truncated distribution; "
            "set mstep.old_logprob to trainer"
        )


def _posterior(recipe: Recipe) -> Iterator[str]:
    em, unlabelled = recipe.em, recipe.data.unlabelled
    if em.posterior == "label" and em.labelled_share < 1:
        yield (
            "posterior label has no labels for unlabelled prompts; set em.labelled_share to 1, or train on hidden answers with "
            "posterior oracle"
        )
    if em.posterior == "oracle" and em.labelled_share == 1:
        yield "posterior oracle trains on the answers of data.unlabelled, but em.labelled_share 1 samples none of its prompts"
    if em.posterior == "oracle" and isinstance(unlabelled, ColumnsSource) and unlabelled.has_no_answers:
        yield (
            "posterior oracle trains on the answers of data.unlabelled, which has none: its answer is null; name their column, or "
            "choose another em.posterior, none of which ever sees them"
        )
    if em.votes is not None and em.votes < em.group_size:
        yield f"em.votes {em.votes} is less than the em.group_size {em.group_size} responses that are trained on; raise it"
    if em.votes is not None and em.posterior not in ("majority_vote", "cluster_frequency"):
        yield (
            f"em.votes is for a posterior that counts answers, em.posterior is {em.posterior}; remove it, and raise em.group_size "
            "for more responses"
        )
    if em.entropy_band is not None and em.labelled_share == 1:
        yield "em.entropy_band chooses among unlabelled groups, of which em.labelled_share 1 leaves none"
    if em.entropy_band is not None and not em.entropy_band[0] < em.entropy_band[1]:
        yield f"em.entropy_band goes from low to high, got {em.entropy_band[0]:g} to {em.entropy_band[1]:g}"
    if em.terminal == "last_prefix" and em.posterior not in ("critic", "frozen_critic"):
        yield f"em.terminal says where the critic is read as reward, but the posterior is {em.posterior}"


def _advantage(recipe: Recipe) -> Iterator[str]:
    em, mstep = recipe.em, recipe.mstep
    if mstep.baseline == "group_mean" and em.labelled_share < 1 and em.group_size == 1:
        yield "a group mean of one response says nothing; raise em.group_size or choose another mstep.baseline"
    if mstep.baseline == "group_mean" and em.labelled_share == 1 and em.labelled_group_size == 1:
        yield "a group mean of one response says nothing; raise em.labelled_group_size or choose another mstep.baseline"
    if mstep.normalise == "group_std" and mstep.baseline != "group_mean":
        yield "mstep.normalise group_std belongs to mstep.baseline group_mean"
    if em.noise_rate and recipe.critic.loss == "bce":
        yield "em.noise_rate corrects outcomes to values beyond [0, 1], where critic.loss bce has no minimum; use mse"
    if mstep.normalise != "self_normalise":
        return
    if em.noise_rate and em.train_policy_on_labelled and em.labelled_share > 0:
        yield (
            "em.noise_rate corrects outcomes to values below 0, of which mstep.normalise self_normalise has no shares; set "
            "em.train_policy_on_labelled to false"
        )
    if mstep.baseline == "critic_prefix":
        yield "mstep.normalise self_normalise weighs whole responses within their group; use mstep.baseline group_mean or none"
    if recipe.critic.target != "zero_one" or not em.clamp:
        yield (
            "mstep.normalise self_normalise takes shares of a total, for which no outcome may be negative; use critic.target "
            "zero_one and em.clamp true"
        )


def _critic(recipe: Recipe) -> Iterator[str]:
    em, every = recipe.em, recipe.estep.every
    if every > 0 and not recipe.em_uses_critic:
        yield (
            f"estep.every is {every}, but with posterior {em.posterior} and baseline {recipe.mstep.baseline} "
            "nothing reads a critic; set estep.every to 0"
        )
    if every > 0 and recipe.groups(em.labelled_share)[0] == 0:
        yield (
            f"estep.every is {every}, but em.labelled_share {em.labelled_share} leaves no labelled prompts to recalibrate on; "
            "raise the share or set estep.every to 0"
        )
    is_fitted = every > 0 or recipe.initialisation.critic_warmup > 0 or recipe.initialisation.rlvr > 0
    if recipe.em_uses_critic and em.iterations > 0 and not is_fitted and recipe.critic.path is None:
        yield "the critic would be used but never fitted; set initialisation.critic_warmup, estep.every or critic.path"
    is_frozen = every == 0 or em.posterior == "frozen_critic"
    if recipe.critic.backbone == "shared" and is_frozen and recipe.em_uses_critic:
        yield "a critic on the policy's own trunk moves with the policy, so it cannot be frozen; use critic.backbone separate"
    if recipe.critic.heads > 1 and recipe.estep.clip != "none":
        yield "estep.clip holds values to old ones, which several heads share; set estep.clip to none or critic.heads to 1"
    if recipe.critic.pessimism and em.posterior not in ("critic", "frozen_critic"):
        yield f"critic.pessimism lowers the critic's outcomes, but the posterior is {em.posterior}; set it to 0"
    if recipe.critic.path is not None and recipe.cold_start.steps > 0:
        yield "critic.path is the critic of a trained policy, but cold_start makes a new one; set cold_start.steps to 0"


def _cadence(recipe: Recipe) -> Iterator[str]:
    every, adaptive, gate = recipe.estep.every, recipe.estep.adaptive, recipe.mstep.gate
    if adaptive.is_on and every < 2:
        yield (
            f"estep.adaptive recalibrates when the critic needs it, but estep.every is {every}; set it to the longest time between "
            "two E-steps, 2 iterations or more"
        )
    if gate.is_on and recipe.em.posterior != "critic":
        yield f"mstep.gate waits for a critic that is recalibrated, but the posterior is {recipe.em.posterior}"
    if gate.is_on and every == 0:
        yield "mstep.gate waits for a better critic, but estep.every is 0, so it never becomes one; set estep.every to 1 or more"


def _schedule(recipe: Recipe) -> Iterator[str]:
    em = recipe.em
    if recipe.estep.filter == "zero_variance" and em.labelled_group_size == 1:
        yield "estep.filter zero_variance would drop every group of one response; raise em.labelled_group_size"
    if em.labelled_share < 1 and em.iterations > 0 and recipe.groups(em.labelled_share)[1] == 0:
        yield f"em.rollouts {em.rollouts} leaves no whole group of {em.samples} for unlabelled prompts; raise it"
    if recipe.initialisation.critic_warmup + recipe.initialisation.rlvr > 0 and recipe.groups(1.0)[0] == 0:
        yield f"em.rollouts {em.rollouts} is less than one labelled group of {em.labelled_group_size}; raise it"
    if em.labelled_share == 1 and not em.train_policy_on_labelled:
        yield "em.labelled_share is 1 and em.train_policy_on_labelled is false, so the policy would never be trained"


def _rollout(recipe: Recipe) -> Iterator[str]:
    rollout, servers = recipe.rollout, recipe.rollout.sglang
    if rollout.backend == "local":
        if rollout.ahead:
            yield "rollout.ahead wants servers that sample while this process trains; use rollout.backend sglang"
        if rollout.partial:
            yield "rollout.partial wants servers that sample ahead of training; use rollout.backend sglang and rollout.ahead"
        return
    if recipe.model.dtype == "float64":
        yield "SGLang has no float64; use model.dtype float32 or bfloat16, or rollout.backend local"
    if rollout.top_k > 4096 or (rollout.top_p < 1 and rollout.top_k < 2):
        yield (
            "SGLang gives the log-probs of a truncated distribution only with top_k between 2 and 4096; "
            "set rollout.top_k beside top_p"
        )
    if rollout.partial and not rollout.ahead:
        yield "rollout.partial interrupts responses that are sampled ahead; set rollout.ahead to 1 or more"
    if rollout.ahead and recipe.mstep.old_logprob == "trainer" and recipe.mstep.importance == "none":
        yield (
            "with rollout.ahead responses come from older weights, for which nothing corrects; set mstep.importance to "
            "token or sequence, or mstep.old_logprob to sampler"
        )
    if rollout.ahead and recipe.estep.every and recipe.em.order == "lagged":
        yield "rollout.ahead makes rollouts lag already; use em.order e_then_m"
    if rollout.ahead and servers.sync in ("distributed", "tensor"):
        yield (
            "with rollout.ahead a server that dies begins with weights on disk; set rollout.sglang.sync to disk, it is "
            f"{servers.sync}"
        )
    if servers.sync == "tensor" and servers.servers != "auto":
        yield "rollout.sglang.sync tensor hands pickles to children of this process only; use distributed or disk for URLs"
    if servers.sync == "distributed" and servers.data_parallel > 1:
        yield "rollout.sglang.sync distributed knows no data_parallel; use more replicas, or sync disk"
