"""One optimiser step of policy and critic, on one process or started by torchrun: the gradients that the optimisers saw.

gradients.py FOLDER: writes FOLDER/CASE.safetensors for every case, from the main rank.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tempo_engine import parallel
from tempo_engine.adapters import Lora
from tempo_engine.blocks import BlockOptions
from tempo_engine.model import Critic, Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import pack
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.updates import CriticUpdate, PolicyUpdate, fit_critic, improve_policy
from tempo_engine.weights import blank_causal_lm, create_causal_lm
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "qwen3", "vocab_size": 41, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0,
    "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.2, "tie_word_embeddings": True,
}  # fmt: skip

LORA = {"blocks": {"lora": Lora(rank=4, alpha=8.0)}}
UNTIED = {"config": {"tie_word_embeddings": False}}
SINGLE = {"dtype": torch.float32}
GROUPS = {"groups": True, "config": {"max_position_embeddings": 128}}
SPLIT = {"tokens": 40}  # micro-batches of at most so many tokens; else each rank has one

# Every case must give the gradients that one process finds for the case named in `like`.
CASES: dict[str, dict[str, Any]] = {
    "plain": {"like": "plain"},
    "split": {"like": "plain", **SPLIT},
    "one row each": {"like": "plain", "tokens": 1},
    "full checkpointing": {"like": "plain", **SPLIT, "blocks": {"activation_checkpointing": "full"}},
    "selective checkpointing": {"like": "plain", **SPLIT, "blocks": {"activation_checkpointing": "selective"}},
    "accumulated in shards": {"like": "plain", **SPLIT, "sharding": {"accumulate": "sharded"}},
    "replicas": {"like": "plain", **SPLIT, "sharding": {"replicas": 2}},
    "replicas, accumulated in shards": {
        "like": "plain", **SPLIT, "sharding": {"replicas": 2, "accumulate": "sharded"},
    },
    "weights kept gathered": {"like": "plain", **SPLIT, "sharding": {"reshard_after_forward": False}},
    "offload": {"like": "plain", **SPLIT, "sharding": {"offload": True}},
    "from files": {"like": "plain", **SPLIT, "from_files": True},
    "untied": {"like": "untied", **UNTIED},
    "untied, split": {"like": "untied", **UNTIED, **SPLIT},
    "shared trunk": {"like": "shared trunk", "backbone": "shared"},
    "shared trunk, split": {"like": "shared trunk", "backbone": "shared", **SPLIT},
    "lora": {"like": "lora", **LORA},
    "lora, split": {"like": "lora", **LORA, **SPLIT},
    "lora, from files": {"like": "lora", **LORA, **SPLIT, "from_files": True},
    "groups": {"like": "groups", **GROUPS},
    "groups, trees": {"like": "groups", **GROUPS, "share_prompts": True},
    "groups, trees, split": {"like": "groups", **GROUPS, "share_prompts": True, "tokens": 150},
    "groups, trees, full checkpointing": {
        "like": "groups", **GROUPS, "share_prompts": True, "blocks": {"activation_checkpointing": "full"},
    },
    "float32": {"like": "float32", **SINGLE},
    "float32, split": {"like": "float32", **SINGLE, **SPLIT},
    "float32, full checkpointing": {
        "like": "float32", **SINGLE, **SPLIT, "blocks": {"activation_checkpointing": "full"},
    },
    "bfloat16": {"like": "float32", "dtype": torch.bfloat16},
}  # fmt: skip


def make_policy(case: dict[str, Any], folder: Path) -> Policy:
    how = Sharding(compute=case.get("dtype", torch.float64), **case.get("sharding", {}))
    if parallel.world_size() % how.replicas:
        how = Sharding(compute=how.compute)
    blocks = BlockOptions(**case.get("blocks", {}))
    config = CONFIG | case.get("config", {})
    if case.get("from_files") and how.is_needed:
        model = blank_causal_lm(folder / "model", dtype=how.storage, attention="sdpa")
        return Policy(model, sharding=how, blocks=blocks, weights=folder / "model")
    model = create_causal_lm(config, dtype=how.storage, attention="sdpa", seed=0)
    return Policy(model, sharding=how, blocks=blocks, share_prompts=case.get("share_prompts", False))


def grouped_rollouts() -> list[Rollout]:
    """Three prompts that are worth sharing, and a short one, with one to five responses in any order."""
    rng = random.Random(7)
    prompts = [Prompt(str(n), "", tuple(rng.randrange(2, 41) for _ in range(n))) for n in (64, 70, 90, 3)]
    order = [0, 1, 0, 2, 3, 0, 1, 2, 0, 1, 3, 0, 1]
    ids = [[rng.randrange(2, 41) for _ in range(rng.randrange(1, 30))] for _ in order]
    return [Rollout(prompts[p], r, [-3.7] * len(r), (), False, "") for p, r in zip(order, ids, strict=True)]


def rollouts() -> list[Rollout]:
    """Eleven rows of very different lengths; their log-probs are near those of a uniform policy."""
    rng = random.Random(5)
    lengths = [(3, 4), (1, 1), (5, 29), (2, 6), (9, 2), (1, 17), (4, 4), (3, 3), (2, 2), (6, 11), (1, 40)]
    rows = []
    for i, (prompt, response) in enumerate(lengths):
        ids = [rng.randrange(2, 41) for _ in range(response)]
        tokens = tuple(rng.randrange(2, 41) for _ in range(prompt))
        rows.append(Rollout(Prompt(str(i), "", tokens), ids, [-3.7] * response, (), False, ""))
    return rows


def gradients(case: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    """A tenth of each gradient (the first moment after one step), whole; and the metrics as one vector each."""
    policy = make_policy(case, folder)
    critic = Critic(policy, backbone=case.get("backbone", "separate"), kind="linear")
    tokens = case.get("tokens", 10_000)
    batch = pack(grouped_rollouts() if case.get("groups") else rollouts())
    generator = torch.Generator().manual_seed(1)
    parallel.assign(critic.head.weight.detach(), torch.randn(32, generator=generator, dtype=torch.float64))
    return_S = (torch.rand(len(batch), generator=generator) > 0.5).float()
    advantage_T = torch.randn(len(batch.target_T), generator=generator)
    steady: dict[str, Any] = {"lr": 0.0, "betas": (0.9, 0.999), "max_grad_norm": 1e9}
    optimizers = {
        "policy": Optimizer(policy.parameters(), **steady),
        "critic": Optimizer(critic.parameters(), **steady),
    }
    values = {"values": critic.values(batch, tokens), "logprobs": policy.token_logprobs(batch, tokens)}
    how = CriticUpdate(epochs=1, minibatches=1, micro_batch_tokens=tokens)
    metrics = fit_critic(critic, optimizers["critic"], batch, return_S, how, seed=0)
    update = PolicyUpdate(
        loss="ppo", epochs=1, minibatches=1, micro_batch_tokens=tokens, clip_low=0.2, clip_high=0.2, entropy_coef=0.1
    )
    old = values["logprobs"] + 0.3 * torch.randn(len(advantage_T), generator=generator)
    metrics |= improve_policy(policy, optimizers["policy"], batch, advantage_T, update, old_logprob_T=old, seed=0)
    found = {**values, "metrics": torch.tensor([metrics[name] for name in sorted(metrics)], dtype=torch.float64)}
    for owner, optimizer in optimizers.items():
        for name, tensor in optimizer.state().items():
            if name.endswith("/exp_avg"):
                found[f"{owner}/{name}"] = parallel.whole(tensor).clone()
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    parallel.start()
    for name, case in CASES.items():
        found = gradients(case, folder)
        if parallel.is_main():
            save_file(found, folder / f"{name}.safetensors")
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    parallel.leave()
