"""The local sampler against `transformers` generate: tokens per CPU-second on the same model, prompts and response lengths.

    python benchmarks/sampler.py [--json FILE] [--repeats 3]

Both sides sample groups of 8 responses to 64-token prompts at temperature 1 with one thread; every response has a set length
(so both do equal work), either all equal or lognormal between 8 and 128 tokens. The check recomputes the sampler's log-probs with
one full forward pass per batch.
"""

# Shape letters: R = rows, L = tokens, V = vocabulary
import argparse
import json
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tempo_engine.model import Policy
from tempo_engine.packing import pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.samplers.local import LocalSampler
from tempo_engine.weights import create_causal_lm
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

PROMPT_TOKENS, GROUP_SIZE, LONGEST = 64, 8, 128
MODELS: dict[str, dict[str, Any]] = {
    "llama-tiny": {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                   "num_key_value_heads": 4, "intermediate_size": 192, "vocab_size": 256},
    "qwen3-small": {"model_type": "qwen3", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "head_dim": 32, "intermediate_size": 768, "vocab_size": 8192},
}  # fmt: skip


class RowLimits(StoppingCriteria):
    """Stops each row of generate at its own length."""

    def __init__(self, limits: torch.Tensor) -> None:
        self.limits = limits

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] - PROMPT_TOKENS >= self.limits


def lengths(kind: str, count: int, rng: np.random.Generator) -> list[int]:
    if kind == "equal":
        return [48] * count
    return [int(n) for n in np.clip(rng.lognormal(3.4, 0.7, count), 8, LONGEST)]


def ours(policy: Policy, prompts: list[Prompt], limits: list[int]) -> list[Rollout]:
    sampler = LocalSampler(stop_ids=[-1], decode=str, max_new_tokens=LONGEST, max_running=256)
    sampler.load(policy)
    return sampler.sample(prompts, GROUP_SIZE, key="bench", limits=limits)


def theirs(model: PreTrainedModel, prompts: list[Prompt], limits: list[int]) -> None:
    """Batches of 256 rows, as ours; each ends when its longest response does."""
    config = GenerationConfig(
        do_sample=True, max_new_tokens=LONGEST, top_k=0, num_return_sequences=GROUP_SIZE, pad_token_id=0
    )
    per_batch = 256 // GROUP_SIZE
    for start in range(0, len(prompts), per_batch):
        ids = torch.tensor([p.token_ids for p in prompts[start : start + per_batch]])
        rows = torch.tensor(limits[start * GROUP_SIZE : (start + per_batch) * GROUP_SIZE])
        model.generate(  # pyright: ignore[reportCallIssue]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([RowLimits(rows)]),
        )


@torch.no_grad()
def largest_gap(policy: Policy, rollouts: list[Rollout]) -> float:
    """Largest |sampler's log-prob - log-prob of a full forward| over all tokens."""
    gap = 0.0
    for start in range(0, len(rollouts), 32):
        batch = pack(rollouts[start : start + 32])
        gap = max(gap, float((policy.token_stats(batch).logprob_T - batch.sampler_logprob_T).abs().max()))
    return gap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=64)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'model':12} {'lengths':9} {'ours tok/s':>11} {'generate':>9} {'ratio':>6} {'log-prob gap':>13}   (tokens per CPU-second)"
    )
    for name, config in MODELS.items():
        model = create_causal_lm(config, dtype=torch.float32, attention="sdpa", seed=0)
        policy = Policy(model)
        model.generation_config.eos_token_id = None  # pyright: ignore[reportOptionalMemberAccess]
        rng = np.random.default_rng(0)
        vocab = config["vocab_size"]
        prompts = [
            Prompt(str(i), "", tuple(rng.integers(0, vocab, PROMPT_TOKENS).tolist())) for i in range(args.prompts)
        ]
        for kind in ("equal", "lognormal"):
            limits = lengths(kind, len(prompts) * GROUP_SIZE, rng)
            gap = largest_gap(policy, ours(policy, prompts, limits))
            theirs(model, prompts[:8], limits[:64])
            seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(args.repeats):  # A B A B: a drift of the machine's speed hits both
                start = time.process_time()
                ours(policy, prompts, limits)
                middle = time.process_time()
                theirs(model, prompts, limits)
                seconds["ours"].append(middle - start)
                seconds["theirs"].append(time.process_time() - middle)
            speed = {side: sum(limits) / statistics.median(values) for side, values in seconds.items()}
            ratio = speed["ours"] / speed["theirs"]
            print(f"{name:12} {kind:9} {speed['ours']:11.0f} {speed['theirs']:9.0f} {ratio:6.2f} {gap:13.1e}")
            comparison = {"op": "sample", "case": f"{name}/{kind}", "dtype": "float32", "unit": "tokens per CPU-second"}
            figures = {
                "ours": speed["ours"],
                "peer": "transformers.generate",
                "theirs": speed["theirs"],
                "ratio": ratio,
            }
            rows.append({**comparison, **figures, "checked": gap < 1e-4})
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        args.json.write_text(
            json.dumps({"device": platform.processor() or platform.machine(), "commit": commit, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
