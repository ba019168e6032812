"""The cases by name: what kind of work a stack meets, and how much better than TRL the engine is to be there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tempo_em.throughput.work import Case

SMOLLM2 = Path("models/SmolLM2-135M-Instruct")  # made by `make smollm2`


class Bench(NamedTuple):
    """`build(quick)` makes the case. `target`: of the ratio to the first peer; `memory_target`: of our peak memory over its."""

    build: Callable[[bool], Case]
    peers: tuple[str, ...] = ("trl", "trl_vllm", "verl", "floor")
    target: float | None = None
    memory_target: float | None = None

    @property
    def reference(self) -> str:
        """The stack whose gradients in float32 are the truth."""
        return self.peers[-1]


def qwen3(hidden_size: int, layers: int, vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden_size, "num_hidden_layers": layers, "vocab_size": vocab_size,
        "intermediate_size": 3 * hidden_size, "num_attention_heads": hidden_size // 32, "head_dim": 32,
        "num_key_value_heads": hidden_size // 64, "tie_word_embeddings": True,
    }  # fmt: skip


def lognormal(count: int, middle: int, low: int, high: int) -> list[int]:
    """Response lengths around a median, as reasoning has them: a few are much longer than the others."""
    drawn = np.random.default_rng(0).lognormal(np.log(middle), 0.7, count)
    return [int(n) for n in np.clip(drawn, low, high)]


def tiny(quick: bool) -> Case:
    """Equal lengths, 0.8 million parameters: nothing to win but overhead."""
    if quick:
        return Case("tiny", qwen3(64, 1, 259), 2, 4, 8, [8] * 8)
    return Case("tiny", qwen3(128, 4, 259), 4, 8, 32, [64] * 32)


def mixed(quick: bool) -> Case:
    """Lengths from 8 to 256."""
    if quick:
        return Case("mixed", qwen3(64, 2, 512), 2, 4, 8, lognormal(8, 12, 4, 32))
    return Case("mixed", qwen3(256, 4, 8192), 8, 8, 32, lognormal(64, 64, 8, 256))


def vocabulary(quick: bool) -> Case:
    """Qwen3's vocabulary on a small trunk."""
    if quick:
        return Case("vocabulary", qwen3(64, 1, 16_384), 2, 4, 8, [8] * 8)
    return Case("vocabulary", qwen3(256, 4, 151_936), 4, 8, 32, [64] * 32)


def prompts(quick: bool) -> Case:
    """Prompts of 512 tokens, 16 responses to each: most of what goes through the model are prompts."""
    if quick:
        return Case("prompts", qwen3(64, 2, 512), 2, 4, 96, [8] * 8)
    return Case("prompts", qwen3(256, 4, 8192), 2, 16, 512, [64] * 32)


def smollm2(quick: bool) -> Case:
    """A real model in bfloat16, weights in float32."""
    if quick:
        return Case("smollm2", str(SMOLLM2), 1, 2, 16, [8, 4], "bfloat16")
    return Case("smollm2", str(SMOLLM2), 2, 8, 128, lognormal(16, 48, 8, 128), "bfloat16")


def tempo(quick: bool) -> Case:
    """The EM step: a policy and a critic, half of the prompts labelled, mixed lengths."""
    if quick:
        return Case("tempo", qwen3(64, 2, 512), 2, 4, 8, lognormal(8, 12, 4, 32), method="tempo")
    return Case("tempo", qwen3(256, 4, 8192), 8, 8, 32, lognormal(64, 64, 8, 256), method="tempo")


CASES = {
    "tiny": Bench(tiny, target=1.0),
    "mixed": Bench(mixed, target=1.5),
    "vocabulary": Bench(vocabulary, target=1.3, memory_target=1 / 3),
    "prompts": Bench(prompts, target=2.5),
    "smollm2": Bench(smollm2),
    "tempo": Bench(tempo, peers=("authors",)),
}


def missing(name: str) -> str:
    """What a case lacks here, in one sentence; empty when it can run."""
    if name == "smollm2" and not SMOLLM2.is_dir():
        return f"case smollm2 needs the model in {SMOLLM2}, which is not here: run make smollm2"
    return ""
