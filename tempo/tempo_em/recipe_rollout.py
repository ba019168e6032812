"""`rollout` of a recipe: sampling, SGLang's servers, and how far a sampler may be from the trainer."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tempo_em.recipe_base import Count, Positive, Strict


class SGLangRecipe(Strict):
    """SGLang servers: started and stopped with the run, or somebody else's."""

    servers: Literal["auto"] | tuple[str, ...] = Field(
        default="auto",
        description="auto: ours, on this machine; or URLs, each a replica (or a router in front of several)",
    )
    replicas: Positive = Field(default=1, description="how many servers of ours")
    key_variable: str = Field(default="SGLANG_API_KEY", description="environment variable with the API key of the URLs")
    allowed_hosts: tuple[str, ...] = Field(
        default=(), description="hosts beside this machine that prompts and weights may go to"
    )
    placement: Literal["colocated", "disaggregated"] = Field(
        default="colocated", description="on the trainer's GPUs, giving memory back between batches, or on others"
    )
    gpus: tuple[Count, ...] = Field(default=(), description="visible devices of our servers; none: the trainer's")
    tensor_parallel: Positive = Field(default=1, description="GPUs that share a model (SGLang's tp-size)")
    data_parallel: Positive = Field(default=1, description="copies inside a server (SGLang's dp-size)")
    sync: Literal["auto", "disk", "distributed", "tensor"] = Field(
        default="auto",
        description="how weights get there; auto: on GPUs tensor to our colocated servers, distributed to others; else disk",
    )
    sync_folder: Path | None = Field(default=None, description="for sync disk; default: in the run folder")
    receipt: Literal["checksum", "probe", "off"] = Field(
        default="checksum",
        description="after each sync: compare every tensor's checksum, or log-probs of a few sequences",
    )
    deterministic: bool = Field(default=False, description="a seed for every response; about a third slower on GPUs")
    keep_cache: bool = Field(default=False, description="keep the prefix cache of the old weights after a sync")
    max_total_tokens: Positive | None = Field(default=None, description="of the KV cache")
    memory_fraction: float | None = Field(default=None, gt=0, lt=1, description="of each GPU, for weights and cache")
    threads: Positive = Field(default=1, description="CPU threads of each server, on a machine without GPUs")
    port: Positive | None = Field(default=None, le=65000, description="of our first server; default: any free one")
    restarts: Count = Field(
        default=3, description="deaths of servers without a finished batch between them before we stop"
    )
    start_minutes: float = Field(default=10.0, gt=0)
    health_seconds: float = Field(default=60.0, gt=0, description="a server silent for so long is dead")
    generation_minutes: float = Field(default=120.0, gt=0, description="bound on one group's responses")
    update_minutes: float = Field(default=10.0, gt=0, description="bound on one call of a weight sync")
    arguments: dict[str, Any] = Field(default={}, description="further arguments of SGLang's server, by their names")

    @model_validator(mode="after")
    def whole(self) -> "SGLangRecipe":
        if self.servers == ():
            raise ValueError("servers is an empty list; give URLs, or auto")
        ours = {"api-key", "admin-api-key", "host", "port", "model-path", "weight-version", "skip-tokenizer-init"}
        if taken := {name for name in self.arguments if name.replace("_", "-") in ours}:
            raise ValueError(f"arguments has {min(taken)}, which the engine sets itself")
        return self


class MismatchRecipe(Strict):
    """Sampler and trainer compute the same log-probs by different programs. `above` bounds are on rollout/mismatch_kl (k3)."""

    every: Count = Field(default=1, description="iterations between looks; with old_logprob trainer they cost nothing")
    band: float = Field(default=0.1, gt=0, description="tokens further apart than this are counted")
    warn_above: float | None = Field(default=0.01, gt=0)
    correct_above: float | None = Field(
        default=None, gt=0, description="from here on mstep.importance (token when none) corrects the iteration"
    )
    stop_above: float | None = Field(default=None, gt=0)


class RolloutRecipe(Strict):
    """Sampling."""

    backend: Literal["local", "sglang"] = Field(default="local", description="in this process, or by SGLang servers")
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: Count = Field(default=0, description="0: off")
    max_prompt_tokens: Positive = 2048
    max_new_tokens: Positive = 1024
    stop: tuple[str, ...] = Field(
        default=(),
        description='texts, one token each, that end a response as its end of sequence does: ["\\n"] for one line',
    )
    max_running: Positive = Field(default=512, description="sequences that decode at a time, in each server")
    ahead: Count = Field(
        default=0, description="iterations that are sampled while earlier ones train: bounds staleness; 0: none, exact"
    )
    partial: bool = Field(
        default=False, description="with ahead: a weight sync interrupts responses, which go on with the new weights"
    )
    sglang: SGLangRecipe = SGLangRecipe()
    mismatch: MismatchRecipe = MismatchRecipe()
