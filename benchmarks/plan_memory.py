"""`tempo-engine plan` against the truth: predicted and measured peak memory of each phase, on this machine's CPU.

    python benchmarks/plan_memory.py [--ranks 2] [--case NAME]... [--json FILE]

Every case is a fresh process (or `--ranks` of them under torchrun). It builds policy, critic and optimisers as a run does, makes up
rollouts of the longest length, and goes through each phase once for AdamW's moments to exist and once to be measured: the largest
resident set during the phase (VmHWM, reset before it) less a baseline. The baseline is the resident set after the imports and after
a miniature of the same model went through every phase, so that what libraries load on first use is not taken for the model's.
So that freed memory leaves the resident set at once, glibc gets MALLOC_ARENA_MAX=1, MALLOC_MMAP_THRESHOLD_=65536 and
MALLOC_TRIM_THRESHOLD_=65536. Of ranks the largest counts.

Exit code 1 when a prediction is off by more than 15%.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tempo_em.loading import parse_setting, resolve
from tempo_em.plan import make_plan
from tempo_em.recipe import Recipe

TOLERANCE = 0.15
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
LLAMA_6M = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096,
}  # fmt: skip
QWEN_34M = {
    "model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 8192,
}  # fmt: skip
LLAMA_124M = {
    "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_key_value_heads": 4, "vocab_size": 32000,
}  # fmt: skip
OLMO_20M = {
    **QWEN_34M,
    "model_type": "olmo3",
    "num_hidden_layers": 4,
    "sliding_window": 64,
    "tie_word_embeddings": True,
}
# Name -> the model's config, and settings that differ from `recipe_of`.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "llama-6M": (LLAMA_6M, []),
    "llama-6M eager": (LLAMA_6M, ["model.attention=eager"]),
    "olmo3-20M tied": (OLMO_20M, []),
    "qwen3-34M": (QWEN_34M, []),
    "qwen3-34M selective": (QWEN_34M, ["model.activation_checkpointing=selective"]),
    "qwen3-34M full": (QWEN_34M, ["model.activation_checkpointing=full"]),
    "qwen3-34M bfloat16 full": (QWEN_34M, ["model.dtype=bfloat16", "model.activation_checkpointing=full"]),
    "qwen3-34M halves": (QWEN_34M, ["micro_batch_tokens=512"]),  # on two ranks, gradients add up here and below only
    "qwen3-34M halves, sharded": (QWEN_34M, ["micro_batch_tokens=512", "parallel.accumulate=sharded"]),
    "llama-124M": (LLAMA_124M, []),
}


MINIATURE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 16, "vocab_size": 512,
}  # fmt: skip


def recipe_of(case: str, **changes: int) -> Recipe:
    """16 labelled and 16 unlabelled rows of 64 + 192 tokens, micro-batches of 4 (halves: 2); `changes` to the model's config."""
    config, settings = CASES[case]
    source = {"generator": "sums", "count": 32}
    fields: dict[str, Any] = {
        "threads": 1,
        "micro_batch_tokens": 1024,
        "model": {"create": {**config, "max_position_embeddings": 256, **changes}},
        "data": {"labelled": source, "unlabelled": source},
        "rollout": {"max_prompt_tokens": 64, "max_new_tokens": 192},
        "em": {"rollouts": 32, "group_size": 4, "labelled_group_size": 4},
        "estep": {"epochs": 1, "minibatches": 1},
        "mstep": {"minibatches": 2},
    }
    return resolve(case, fields, [parse_setting(setting) for setting in settings]).recipe


def phases_of(recipe: Recipe) -> dict[str, Callable[[], Any]]:
    """Each phase of an iteration on made-up rollouts of the longest length, as functions without arguments."""
    import torch
    from tempo_em.build import build
    from tempo_engine.packing import pack
    from tempo_engine.rollout import Prompt, Rollout
    from tempo_engine.samplers.local import LocalSampler
    from tempo_engine.updates import fit_critic, improve_policy

    loop = build(recipe).loop
    policy, critic, critic_optimizer, sampler = loop.policy, loop.critic, loop.critic_optimizer, loop.sampler
    assert critic is not None
    assert critic_optimizer is not None
    assert isinstance(sampler, LocalSampler)
    sampler.stop_ids, sampler.decode = frozenset({-1}), str  # every response runs to its limit
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(policy.vocab_size, (count,), generator=generator).tolist()

    def rollouts(count: int) -> list[Rollout]:
        P, M = recipe.rollout.max_prompt_tokens, recipe.rollout.max_new_tokens
        return [Rollout(Prompt(str(i), "", tuple(ids(P))), ids(M), [-5.0] * M, (), True, "") for i in range(count)]

    num_labelled = recipe.em.rollouts // 2
    labelled, everything = pack(rollouts(num_labelled)), pack(rollouts(recipe.em.rollouts))
    advantage_T = torch.randn(len(everything.sampler_logprob_T), generator=generator)
    prompts = [rollout.prompt for rollout in rollouts(num_labelled // recipe.em.group_size)]

    def sample() -> None:
        sampler.load(policy)
        sampler.sample(prompts, recipe.em.group_size, key="rollout")

    return {
        "rollout": sample,
        "values": lambda: critic.values(everything, recipe.micro_batch_tokens),
        "critic update": lambda: fit_critic(
            critic, critic_optimizer, labelled, torch.ones(num_labelled), loop.critic_update, seed=0
        ),
        "log-probs": lambda: policy.token_logprobs(everything, recipe.micro_batch_tokens),
        "policy update": lambda: improve_policy(
            policy, loop.policy_optimizer, everything, advantage_T, loop.policy_update,
            old_logprob_T=everything.sampler_logprob_T, seed=0,
        ),
    }  # fmt: skip


def measure(case: str) -> None:
    """Print bytes above the baseline at the peak of each phase, in this process; of ranks the largest."""
    from tempo_engine import parallel

    for run in phases_of(recipe_of(case, **MINIATURE)).values():
        run()
    gc.collect()
    baseline = _status("VmRSS")
    phases = phases_of(recipe_of(case))
    for name in ("critic update", "policy update"):
        phases[name]()
    found = {}
    for name, run in phases.items():
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        run()
        found[name] = int(parallel.largest(_status("VmHWM") - baseline))
    if parallel.is_main():
        print(json.dumps(found))
    parallel.stop()
    parallel.leave()


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def run_case(case: str, ranks: int) -> dict[str, int]:
    command = [sys.executable, __file__, "--measure", case]
    if ranks > 1:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [sys.executable, *torchrun, *command[1:]]
    environment = os.environ | MALLOC | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{case} failed:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--case", action="append", help="only cases whose name contains this; repeatable")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    rows = []
    print(f"{'case':25} {'phase':14} {'predicted MB':>13} {'measured MB':>12} {'off by':>7}   fullest moment")
    for case in CASES:
        if args.case and not any(part in case for part in args.case):
            continue
        plan = make_plan(recipe_of(case), gpu="cpu", per_node=args.ranks)
        measured = run_case(case, args.ranks)
        for phase in plan.phases:
            predicted, truth = phase.peak.total, measured[phase.name]
            off = predicted / truth - 1
            print(
                f"{case:25} {phase.name:14} {predicted / 1e6:13.1f} {truth / 1e6:12.1f} {off:+7.1%}   {phase.peak.name}"
            )
            figures = {"predicted": predicted, "measured": truth, "off": off, "moment": phase.peak.name}
            rows.append({"case": case, "ranks": args.ranks, "phase": phase.name, **figures})
    worst = max(abs(row["off"]) for row in rows)
    print(f"off by {worst:.1%} at most")
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        device = platform.processor() or platform.machine()
        args.json.write_text(json.dumps({"device": device, "commit": commit, "rows": rows}, indent=1))
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
