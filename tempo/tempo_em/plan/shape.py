"""What a model's config says of its size: dimensions, parameters of each part, the tokens each layer looks back at."""

# Shape letters: D = hidden size, F = intermediate size, V = vocabulary, Q = heads x head size, K = key/value heads x head size
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from tempo_engine.errors import UserError


class Family(NamedTuple):
    """How the blocks of an architecture differ: where the norms stand, what normalises queries and keys, which layers have a bias,
    whether a window may slide over tokens; and defaults of its transformers config that sizes depend on."""

    norm: Literal["before", "after"] = "before"
    qk_norm: Literal["none", "per_head", "whole"] = "none"
    qkv_bias: bool = False
    head_size: int | None = None
    slides: bool = True
    window: int | None = None
    experts: bool = False


FAMILIES = {
    "llama": Family(slides=False),
    "mistral": Family(window=4096),
    "mixtral": Family(experts=True),
    "olmo2": Family(norm="after", qk_norm="whole", slides=False),
    "olmo3": Family(norm="after", qk_norm="whole", window=4096),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm="per_head", head_size=128),
    "qwen3_moe": Family(qk_norm="per_head", experts=True),
}


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder-only transformer with rotary positions, RMSNorm and a gated MLP."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    is_tied: bool
    has_attention_bias: bool
    has_mlp_bias: bool
    windows: tuple[int | None, ...]
    num_experts: int
    experts_per_token: int
    max_positions: int | None

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Input and output size of each linear layer of a block by its name. Experts are no linear layers: adapters skip them."""
        D, F = self.hidden_size, self.intermediate_size
        sizes = {
            "q_proj": (D, self.query_size),
            "k_proj": (D, self.kv_size),
            "v_proj": (D, self.kv_size),
            "o_proj": (self.query_size, D),
        }
        return sizes if self.num_experts else sizes | {"gate_proj": (D, F), "up_proj": (D, F), "down_proj": (F, D)}

    @cached_property
    def block(self) -> int:
        """Parameters of one block."""
        D = self.hidden_size
        matrices = sum(inputs * outputs for inputs, outputs in self.linears.values())
        matrices += self.num_experts * (self.expert + D)
        qkv, out = self.query_size + 2 * self.kv_size, D
        biases = qkv * (self.family.qkv_bias or self.has_attention_bias) + out * self.has_attention_bias
        biases += (2 * self.intermediate_size + D) * self.has_mlp_bias
        heads = {"none": 0, "per_head": 2 * self.head_size, "whole": self.query_size + self.kv_size}
        return matrices + biases + 2 * D + heads[self.family.qk_norm]

    @property
    def expert(self) -> int:
        return 3 * self.hidden_size * self.intermediate_size

    @property
    def embedding(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def trunk(self) -> int:
        """The model without an LM head of its own: embedding, blocks, last norm."""
        return self.embedding + self.num_layers * self.block + self.hidden_size

    @property
    def total(self) -> int:
        return self.trunk + (0 if self.is_tied else self.embedding)

    @property
    def active_block(self) -> int:
        """Parameters of a block that one token meets."""
        return (
            self.block - (self.num_experts - self.experts_per_token) * self.expert if self.num_experts else self.block
        )

    @property
    def active(self) -> int:
        return self.total - self.num_layers * (self.block - self.active_block)

    def adapted(self, targets: str | tuple[str, ...]) -> frozenset[str]:
        """Names of the linear layers that get adapters. Raises UserError for a target that no block has."""
        names = set(self.linears) if targets == "all-linear" else set(targets)
        if unknown := names - set(self.linears):
            raise UserError(
                f"model.lora.targets has {', '.join(sorted(unknown))}; the linear layers of a {self.model_type} block are "
                f"{', '.join(self.linears)}"
            )
        return frozenset(names)

    def adapters(self, rank: int, targets: str | tuple[str, ...]) -> int:
        """Parameters of one block's low-rank adapters."""
        return sum(rank * sum(self.linears[name]) for name in self.adapted(targets))


def shape_of(config: dict[str, Any], where: str) -> Shape:
    """The shape that a Hugging Face config (config.json as a dict) describes.

    Raises UserError for an architecture the planner does not know, and for a config without its sizes.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{where} is a {model_type}; plan knows the architectures {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]

    def size(*names: str, default: int | None = None) -> int:
        found = next((config[name] for name in names if config.get(name) is not None), default)
        if not isinstance(found, int) or found < 1:
            raise UserError(f"{where} has {names[0]} {found!r}; plan needs it as a positive number")
        return found

    D, heads, layers = size("hidden_size"), size("num_attention_heads"), size("num_hidden_layers")
    if family.experts and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise UserError(f"{where} mixes blocks with and without experts; plan takes models whose blocks are all alike")
    width = ("moe_intermediate_size",) if model_type == "qwen3_moe" else ("intermediate_size",)
    return Shape(
        model_type=model_type,
        hidden_size=D,
        intermediate_size=size(*width),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=size("num_key_value_heads", default=heads),
        head_size=size("head_dim", default=family.head_size or D // heads),
        vocab_size=size("vocab_size"),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        has_attention_bias=bool(config.get("attention_bias", False)),
        has_mlp_bias=bool(config.get("mlp_bias", False)),
        windows=_windows(config, family, layers),
        num_experts=size("num_experts", "num_local_experts") if family.experts else 0,
        experts_per_token=size("num_experts_per_tok") if family.experts else 0,
        max_positions=config.get("max_position_embeddings"),
    )


def _windows(config: dict[str, Any], family: Family, num_layers: int) -> tuple[int | None, ...]:
    """How many tokens each layer looks back at; None: all. The rules are those of the transformers configs."""
    model_type, window = config["model_type"], config.get("sliding_window", family.window)
    if not family.slides or (model_type.startswith("qwen") and not config.get("use_sliding_window", False)):
        window = None
    kinds = config.get("layer_types")
    if kinds is None and model_type == "olmo3":
        kinds = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(num_layers)]
    elif kinds is None:
        first = config.get("max_window_layers", 28) if model_type.startswith("qwen") else 0
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
