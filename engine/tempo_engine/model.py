"""Policy and critic: what a batch is worth under a Hugging Face model. Log-probs, entropies and values; no losses."""

# Shape letters: N = packed tokens, T = packed response tokens, TS = T + S values, D = hidden size
import copy
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tempo_kernels import TokenStats, linear_logprob, value_head
from tempo_kernels.segments import segment_index
from tempo_kernels.value_head import HeadKind
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tempo_engine.errors import UserError, first_sentence
from tempo_engine.packing import PackedBatch

Attention = Literal["eager", "sdpa", "flash_attention_2"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def require_model_directory(path: Path) -> None:
    """Raises UserError when the directory lacks its config or its safetensors weights."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a Hugging Face model directory: {path}/config.json does not exist")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} has no *.safetensors weights; save the model with save_pretrained() into that directory"
        )


def load_whole(auto_class: Any, path: Path, **options: Any) -> PreTrainedModel:
    """`auto_class.from_pretrained` of a local safetensors directory that has every weight of the model.

    Raises UserError when weights are missing: transformers would fill them with random numbers.
    """
    model, report = auto_class.from_pretrained(
        path, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(f"{path} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} for one")
    return model


def load_causal_lm(path: Path, *, dtype: str, attention: Attention) -> PreTrainedModel:
    """A causal language model from a Hugging Face directory (config.json and safetensors; never pickles, never remote code).

    Raises UserError when the directory, its config or its weights are missing or unusable.
    """
    require_model_directory(path)
    try:
        return load_whole(AutoModelForCausalLM, path, dtype=DTYPES[dtype], attn_implementation=attention)
    except UserError:
        raise
    # transformers, safetensors and flash-attn raise many kinds of exception for a directory that they cannot use
    except Exception as error:
        raise UserError(f"transformers cannot load {path}: {first_sentence(error)}") from error


def create_causal_lm(config: dict[str, Any], *, dtype: str, attention: Attention, seed: int) -> PreTrainedModel:
    """A freshly initialised causal language model: `config` holds `model_type` and whatever its transformers config takes.

    Raises UserError when transformers does not know the model type or refuses the config.
    """
    fields = dict(config)
    try:
        model_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(model_config, dtype=DTYPES[dtype], attn_implementation=attention)
    except Exception as error:  # each architecture's config checks itself in its own way
        raise UserError(f"transformers cannot create model.create {config}: {first_sentence(error)}") from error


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The model without its LM head: the module whose last_hidden_state the head reads."""
    return cast(nn.Module, model.base_model)


def hidden_states(trunk: nn.Module, batch: PackedBatch, index: Tensor) -> Tensor:
    """Last hidden states at the chosen packed positions, [len(index), D].

    FlashAttention reads the packed row as it is (transformers finds the boundaries from position_ids that start again at 0);
    elsewhere the sequences are padded on the right, which causal attention cannot see.
    """
    attention = cast(Any, trunk).config._attn_implementation
    if attention == "flash_attention_2":
        hidden = trunk(input_ids=batch.input_ids_N[None], position_ids=batch.position_N[None], use_cache=False)
        return hidden.last_hidden_state[0][index]
    ids_BL, index_N = batch.padded()
    hidden = trunk(input_ids=ids_BL, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)[index_N[index]]


class Policy:
    """A causal language model that is being improved. `version` counts its updates."""

    def __init__(self, model: PreTrainedModel, *, temperature: float = 1.0, version: int = 0) -> None:
        self.model = model.eval()  # dropout has no place in a ratio of probabilities
        self.trunk = trunk_of(model)
        self.temperature = temperature
        self.version = version
        head = cast(nn.Linear, model.get_output_embeddings())
        self.head_weight, self.head_bias = head.weight, head.bias
        self.softcap: float | None = getattr(model.config, "final_logit_softcapping", None)
        self._check_head()

    @torch.no_grad()
    def _check_head(self) -> None:
        """Trunk and LM head must reproduce the model's own logits: some architectures scale them in their forward."""
        ids = torch.arange(4, device=self.device)[None] % len(self.head_weight)
        own = self.model(input_ids=ids, use_cache=False).logits[0].float()
        ours = self.logits(self.trunk(input_ids=ids, use_cache=False).last_hidden_state[0])
        if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3):
            raise UserError(
                f"{type(self.model).__name__} changes its logits after the LM head in a way this engine does not know "
                f"(largest difference {float((own - ours).abs().max()):.3g}); use another architecture"
            )

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    def logits(self, hidden: Tensor) -> Tensor:
        """LM head on hidden states, float32, before the temperature."""
        logits = nn.functional.linear(hidden, self.head_weight, self.head_bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def token_stats(self, batch: PackedBatch) -> TokenStats:
        """Log-prob, entropy and more of each response token at the sampling temperature, [T] each."""
        hidden_TD = hidden_states(self.trunk, batch, batch.logprob_index_T)
        return linear_logprob(
            hidden_TD,
            self.head_weight,
            batch.target_T,
            bias=self.head_bias,
            temperature=self.temperature,
            softcap=self.softcap,
        )

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]


class Critic:
    """A token-level value function V(x, y_<t), read before each response token and after the last.

    `separate`: a trunk of its own, a copy of the policy's. `shared`: a value head on the policy's trunk, which the critic then
    never trains: an E-step must not move the policy. The head starts at zero, so every value starts at 0 (linear) or 1/2 (sigmoid).
    """

    def __init__(self, policy: Policy, *, backbone: Literal["separate", "shared"], head: HeadKind) -> None:
        self.backbone = backbone
        self.head: HeadKind = head
        self.config = policy.model.config
        self.trunk = copy.deepcopy(policy.trunk) if backbone == "separate" else policy.trunk
        # The head is at least float32 whatever the trunk is: a difference of two values near 1 would drown in bf16 spacing.
        dtype = torch.promote_types(policy.head_weight.dtype, torch.float32)
        hidden_size = policy.head_weight.shape[1]
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=policy.device))
        self.bias = nn.Parameter(torch.zeros((), dtype=dtype, device=policy.device))

    def copy_trunk(self, policy: Policy) -> None:
        """Take over the policy's trunk as it is now: a critic begins with what the policy has learned."""
        if self.backbone == "separate":
            self.trunk.load_state_dict(policy.trunk.state_dict())

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states that values are read from, [TS, D]; without gradient on the policy's trunk."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.backbone == "separate"):
            return hidden_states(self.trunk, batch, batch.value_index_TS)

    @torch.no_grad()
    def values(self, batch: PackedBatch, max_tokens: int) -> Tensor:
        """T + 1 values per sequence, [TS] float32, computed in micro-batches of at most `max_tokens`."""
        value_TS = torch.empty(len(batch.value_index_TS), dtype=torch.float32, device=self.weight.device)
        for rows in batch.micro_batches(torch.arange(len(batch), device=self.weight.device), max_tokens):
            part = value_head(self.hidden(batch.select(rows)), self.weight, self.bias, head=self.head)
            value_TS[segment_index(batch.cu_values_S1, rows)] = part.float()
        return value_TS

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        trunk = self.trunk.named_parameters() if self.backbone == "separate" else []
        own = [("value_head.weight", self.weight), ("value_head.bias", self.bias)]
        return [(f"trunk.{name}", p) for name, p in trunk if p.requires_grad] + own
