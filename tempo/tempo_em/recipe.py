"""recipe.yaml as strict models. Every field says what it does; every value knows where it came from.

Values come in four layers, later ones winning: defaults here, the method's preset, the recipe file, `--set a.b=c`.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from tempo_em.recipe_base import Count, Decay, NoiseRate, Positive, Probability, Strict
from tempo_em.recipe_data import DataRecipe
from tempo_em.recipe_generated import AnyTask
from tempo_em.recipe_rollout import RolloutRecipe

Posterior = Literal["label", "critic", "frozen_critic", "majority_vote", "cluster_frequency", "oracle", "random"]


def _word_off(value: Any) -> Any:
    """YAML takes a bare `off` for false; here it is a word among others."""
    return "off" if value is False else value


class LoraRecipe(Strict):
    """Low-rank adapters (peft) on the linear layers of the blocks: policy and critic train these instead of their weights."""

    rank: Positive = 16
    alpha: float = Field(default=32.0, gt=0, description="adapters are scaled by alpha / rank")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear", description="all-linear, or names of layers such as [q_proj, v_proj]"
    )


class ModelRecipe(Strict):
    """The policy: a Hugging Face directory, or a config to create a fresh model from."""

    path: Path | None = Field(default=None, description="Hugging Face directory with safetensors weights")
    create: dict[str, Any] | None = Field(
        default=None, description="transformers config with model_type, for a fresh model"
    )
    dtype: Literal["float32", "bfloat16", "float64"] = Field(
        default="float32", description="precision of the computation; with bfloat16 weights are kept in float32"
    )
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    activation_checkpointing: Annotated[Literal["off", "selective", "full"], BeforeValidator(_word_off)] = Field(
        default="off", description="what the backward computes again: nothing, all but matrix products, whole blocks"
    )
    compile: bool = Field(default=False, description="torch.compile of the blocks")
    share_prompts: bool = Field(
        default=True,
        description="train on a prompt once for all its responses where that pays: from 64 tokens on, with eager or sdpa attention",
    )
    lora: LoraRecipe | None = None

    @model_validator(mode="after")
    def one_origin(self) -> "ModelRecipe":
        if (self.path is None) == (self.create is None):
            raise ValueError("give either path (a model directory) or create (a config for a fresh model)")
        if self.create is not None and not isinstance(self.create.get("model_type"), str):
            raise ValueError("create needs model_type, for example llama or qwen3")
        if self.attention == "flash_attention_2" and self.dtype != "bfloat16":
            raise ValueError(
                f"attention flash_attention_2 works in bfloat16, dtype is {self.dtype}; set dtype: bfloat16"
            )
        return self


class OptimRecipe(Strict):
    """AdamW and its learning-rate schedule."""

    lr: float = Field(default=1e-6, ge=0)
    warmup_steps: Count = 0
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_skipped: Positive = Field(
        default=3, description="so many non-finite gradients in a row stop the run with exit code 3"
    )


class ParallelRecipe(Strict):
    """How models are spread over processes (FSDP2). One process needs none of it."""

    replicas: Positive = Field(
        default=1, description="copies of the sharded model (HSDP): its shards lie within world size / replicas"
    )
    reshard_after_forward: bool = Field(default=True, description="free gathered weights between forward and backward")
    accumulate: Literal["whole", "sharded"] = Field(
        default="whole",
        description="gradients between micro-batches: whole (communicate once a step) or sharded (less memory)",
    )
    offload: bool = Field(default=False, description="keep shards in host memory while they are not used")
    timeout_minutes: Positive = Field(default=30, description="a rank that waits longer for the others gives up")


class CriticRecipe(Strict):
    """The token-level value function. It begins with the policy's trunk and a head of zeros, or with an exported critic."""

    path: Path | None = Field(default=None, description="an exported critic: token classification with one label")
    backbone: Literal["separate", "shared"] = Field(
        default="separate", description="a network of its own, or a value head on the policy's trunk"
    )
    head: Literal["linear", "sigmoid"] = "linear"
    loss: Literal["mse", "bce"] = "mse"
    target: Literal["zero_one", "plus_minus_one"] = Field(
        default="zero_one", description="what wrong and right regress on"
    )

    heads: Positive = Field(default=1, description="more than one: an ensemble on one trunk; values are its mean")
    pessimism: float = Field(
        default=0.0,
        ge=0,
        description="outcomes of unlabelled responses are the heads' mean less so many standard deviations",
    )

    @model_validator(mode="after")
    def head_fits(self) -> "CriticRecipe":
        if self.pessimism and self.heads == 1:
            raise ValueError("pessimism is about heads that disagree, of which there is one; set heads to 2 or more")
        if self.heads > 1 and self.head == "sigmoid":
            raise ValueError(
                "several heads are exported as their mean, which sigmoid ones do not have; use head linear"
            )
        if self.heads > 1 and self.path is not None:
            raise ValueError("an exported critic has one head; set heads to 1 with path")
        if self.loss == "bce" and self.head != "sigmoid":
            raise ValueError("loss bce wants head sigmoid: a linear head's value is not a probability")
        if self.head == "sigmoid" and self.target != "zero_one":
            raise ValueError("head sigmoid lies in [0, 1]; use target zero_one")
        if self.path is not None and self.backbone == "shared":
            raise ValueError("an exported critic has a trunk of its own; use backbone separate with path")
        return self

    @property
    def target_range(self) -> tuple[float, float]:
        return (0.0, 1.0) if self.target == "zero_one" else (-1.0, 1.0)


class ColdStartRecipe(Strict):
    """Supervised steps on worked responses written by a generator. 0 steps: none."""

    steps: Count = 0
    task: AnyTask | None = Field(
        default=None,
        description="the generator with its settings, without count; none: that of data.labelled. A wider one makes a policy that "
        "can do what no label covers",
    )
    batch_size: Positive = 128
    mix: dict[str, Probability] = Field(default={"right": 1.0}, description="share of each kind of trace")
    optim: OptimRecipe = OptimRecipe(lr=1e-3, schedule="linear")

    @model_validator(mode="after")
    def whole(self) -> "ColdStartRecipe":
        if abs(sum(self.mix.values()) - 1) > 1e-6:
            raise ValueError(f"the shares of mix must add up to 1, they add up to {sum(self.mix.values()):g}")
        return self


class InitialisationRecipe(Strict):
    """Stages on labelled prompts before the EM loop."""

    critic_warmup: Count = Field(default=0, description="iterations that fit the critic only")
    rlvr: Count = Field(default=0, description="iterations of PPO with the token critic and the label as outcome")


class EMRecipe(Strict):
    """The schedule of the EM loop."""

    seed: Count | None = Field(
        default=None,
        description="draws other unlabelled and held-out questions and other responses for one cold start and critic; none: seed",
    )
    iterations: Count = 100
    rollouts: Positive = Field(
        default=512, description="responses sampled an iteration, labelled and unlabelled together"
    )
    labelled_share: Probability = Field(default=0.5, description="share of the rollouts on labelled prompts")
    group_size: Positive = Field(default=8, description="responses to an unlabelled prompt")
    labelled_group_size: Positive = Field(default=2, description="responses to a labelled prompt")
    dynamic_sampling: bool = Field(
        default=False,
        description="unlabelled groups whose responses all give the same answer are replaced, up to 10 times",
    )
    votes: Positive | None = Field(
        default=None,
        description="responses to an unlabelled prompt that vote, of which the first group_size train; none: those",
    )
    entropy_band: tuple[Probability, Probability] | None = Field(
        default=None,
        description="unlabelled groups train only when the entropy of their answers, as a share of log(responses), is in between",
    )
    posterior: Posterior = Field(default="critic", description="who says how good an unlabelled response is")
    clamp: bool = Field(default=True, description="the critic's outcomes are held within the range of its targets")
    train_policy_on_labelled: bool = Field(
        default=True, description="labelled rows join the M-step with the label as outcome"
    )
    noise_rate: NoiseRate = Field(
        default=0.0,
        description="how often verdicts on labelled responses are believed wrong; outcomes are corrected for it",
    )
    order: Literal["e_then_m", "lagged"] = Field(
        default="e_then_m", description="recalibrate before or after values are read"
    )
    terminal: Literal["after_last_token", "last_prefix"] = Field(
        default="after_last_token",
        description="where the critic is read as outcome; last_prefix: before the last token",
    )

    @property
    def samples(self) -> int:
        """Responses to each unlabelled prompt."""
        return self.votes or self.group_size


class AdaptiveRecipe(Strict):
    """Recalibrate before estep.every iterations are over: when the critic judges fresh labelled responses worse than it did at the
    first look after its last E-step, or when the policy has moved too far since."""

    auroc_band: float | None = Field(default=None, ge=0, lt=1, description="its AUROC has fallen by more than this")
    brier_band: float | None = Field(
        default=None, ge=0, lt=1, description="its Brier score has risen by more than this"
    )
    kl_budget: float | None = Field(
        default=None, gt=0, description="nats a response, of the policy at the last E-step against the present one"
    )
    kl_responses: Positive = Field(default=32, description="on so many labelled responses of the last E-step")

    @property
    def is_on(self) -> bool:
        return (self.auroc_band, self.brier_band, self.kl_budget) != (None, None, None)


class EStepRecipe(Strict):
    """Critic recalibration."""

    every: Count = Field(default=1, description="recalibrate every so many iterations; 0: never")
    adaptive: AdaptiveRecipe = AdaptiveRecipe()
    epochs: Positive = 4
    minibatches: Positive = 2
    filter: Literal["none", "zero_variance"] = Field(
        default="none", description="labelled groups the E- and M-step leave out"
    )
    clip: Literal["none", "token", "sequence_mean"] = "none"
    clip_range: float = Field(default=0.1, gt=0)
    optim: OptimRecipe = OptimRecipe()


class GateRecipe(Strict):
    """The policy waits, and the critic is recalibrated each iteration, while the critic judges fresh labelled responses worse."""

    auroc_below: float | None = Field(default=None, gt=0, le=1)
    brier_above: float | None = Field(default=None, ge=0, lt=1)

    @property
    def is_on(self) -> bool:
        return (self.auroc_below, self.brier_above) != (None, None)


class MStepRecipe(Strict):
    """Policy refinement."""

    loss: Literal["gspo", "ppo", "reinforce"] = "gspo"
    clip_low: float = Field(default=3e-4, ge=0, lt=1)
    clip_high: float = Field(default=5e-4, ge=0)
    dual_clip: float | None = Field(default=None, gt=1)
    aggregate: Literal["token_mean", "sequence_mean", "fixed_denominator"] = Field(
        default="sequence_mean",
        description="of tokens, of sequences' means, or sums over rollout.max_new_tokens, whatever their lengths",
    )
    entropy_coef: float = 0.0
    baseline: Literal["critic_prefix", "group_mean", "none"] = "critic_prefix"
    normalise: Literal[
        "whiten", "whiten_per_population", "scale_per_population", "group_std", "self_normalise", "none"
    ] = Field(
        default="whiten_per_population",
        description="self_normalise: outcomes become shares of their group's total, as in an exact E-step",
    )
    kl_coef: float = Field(default=0.0, ge=0, description="weight of KL(policy || reference); 0: no reference model")
    kl: Literal["k1", "k3"] = "k3"
    gate: GateRecipe = GateRecipe()
    importance: Literal["none", "token", "sequence"] = Field(
        default="none", description="truncated correction for what sampler and trainer disagree on, or for staleness"
    )
    importance_cap: float = Field(default=2.0, gt=0)
    epochs: Positive = 1
    minibatches: Positive = 2
    old_logprob: Literal["trainer", "sampler"] = Field(
        default="trainer", description="denominator of the ratio: recomputed, or the sampler's own"
    )
    optim: OptimRecipe = OptimRecipe()


class AlarmsRecipe(Strict):
    """Warnings that need no hidden answer, from means over `window` iterations of the EM loop against the best such mean before."""

    window: Positive = 5
    auroc_drop: float | None = Field(
        default=0.1, gt=0, description="the critic's AUROC on fresh labelled responses has fallen by so much"
    )
    accuracy_drop: float | None = Field(default=0.1, gt=0, description="labelled accuracy has fallen by so much")
    promise_gap: float | None = Field(
        default=0.25,
        gt=0,
        description="outcomes of unlabelled responses have risen by so much more than labelled accuracy since the loop began",
    )
    transfer_gap: float | None = Field(
        default=0.2,
        gt=0,
        description="E-steps change the critic's judgement of unlabelled responses by so much more than that of labelled ones: its "
        "values before and after correlate by so much less; null also spares the measurement",
    )


class EvaluationRecipe(Strict):
    """When and how much to evaluate. The EM loop's start and end always are."""

    every: Count = Field(default=20, description="iterations between evaluations; 0: only start and end")
    samples: Positive = 16


class TrackingRecipe(Strict):
    """Where metrics go besides metrics.jsonl, which has all of them."""

    sinks: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[], description="TensorBoard files in the run folder; Weights & Biases; trackio"
    )
    project: str = Field(default="tempo-engine", min_length=1, description="of wandb and trackio")


class CheckpointRecipe(Strict):
    every: Count = Field(default=20, description="iterations between checkpoints; 0: only at the end of a stage")
    keep: Positive = 2
    asynchronous: bool = Field(default=False, description="write while the run goes on, from a copy in host memory")
    export: bool = Field(default=True, description="export policy and critic in Hugging Face format at the end")


class Recipe(Strict):
    """A whole run."""

    method: str = "tempo"
    seed: Count = 0
    threads: Count = Field(default=0, description="CPU threads; 0: leave torch's choice")
    micro_batch_tokens: Positive = Field(
        default=16384, description="tokens, padding included, of one forward and backward pass"
    )
    parallel: ParallelRecipe = ParallelRecipe()
    model: ModelRecipe
    critic: CriticRecipe = CriticRecipe()
    data: DataRecipe
    rollout: RolloutRecipe = RolloutRecipe()
    cold_start: ColdStartRecipe = ColdStartRecipe()
    initialisation: InitialisationRecipe = InitialisationRecipe()
    em: EMRecipe = EMRecipe()
    estep: EStepRecipe = EStepRecipe()
    mstep: MStepRecipe = MStepRecipe()
    alarms: AlarmsRecipe = AlarmsRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    tracking: TrackingRecipe = TrackingRecipe()

    @property
    def loop_seed(self) -> int:
        """Seed of what is sampled, and of the questions that a start shared by several runs need not share."""
        return self.seed if self.em.seed is None else self.em.seed

    @property
    def em_uses_critic(self) -> bool:
        return self.em.posterior in ("critic", "frozen_critic") or self.mstep.baseline == "critic_prefix"

    @property
    def keeps_frozen_critic(self) -> bool:
        """Whether the critic that the EM loop begins with is kept beside the one that is recalibrated."""
        return self.em.posterior == "frozen_critic" and self.estep.every > 0

    @property
    def uses_critic(self) -> bool:
        """Whether the run needs a critic at all; the voting methods do not, which halves their memory."""
        return (
            self.em_uses_critic
            or self.critic.path is not None
            or self.initialisation.critic_warmup > 0
            or self.initialisation.rlvr > 0
        )

    def groups(self, labelled_share: float) -> tuple[int, int]:
        """Labelled and unlabelled prompts of one iteration."""
        labelled = round(self.em.rollouts * labelled_share)
        return labelled // self.em.labelled_group_size, (self.em.rollouts - labelled) // self.em.samples
