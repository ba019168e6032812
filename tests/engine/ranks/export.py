"""Started by torchrun: exports of sharded models. Each rank writes the names of wrong tensors to FOLDER/result-RANK.json.

FOLDER holds two exported policies, seed0 and seed1. The policy is the first; the critic's trunk is the second's.
"""

import json
import sys
from pathlib import Path

import torch
from tempo_engine import checkpoint, export, parallel
from tempo_engine.model import Critic, Policy
from tempo_engine.parallel import Sharding, whole
from tempo_engine.tokenizer import load_tokenizer
from tempo_engine.weights import blank_causal_lm


def sharded(path: Path) -> Policy:
    model = blank_causal_lm(path, dtype=torch.float32, attention="sdpa")
    return Policy(model, sharding=Sharding(), weights=path)


def main(folder: Path) -> None:
    parallel.start()
    tokenizer, policy = load_tokenizer(folder / "seed0"), sharded(folder / "seed0")
    critic = Critic(sharded(folder / "seed1"), backbone="separate", kind="linear")
    parallel.assign(critic.head.weight.detach(), torch.arange(32) / 32)
    parallel.assign(critic.head.bias.detach(), torch.tensor([-0.4]))

    export.export_policy(policy, tokenizer, folder / "live" / "policy")
    export.export_critic(critic, tokenizer, folder / "live" / "critic")
    tensors = {f"policy/{name}": p.detach() for name, p in policy.parameters()}
    tensors |= {f"critic/{name}": p.detach() for name, p in critic.parameters()}
    checkpoint.save(folder / "checkpoints", 1, tensors, {})
    if parallel.is_main():
        export.save_skeleton(policy, tokenizer, folder / "model")

    restored = Critic(policy, backbone="separate", kind="linear")
    export.restore_critic(restored, folder / "live" / "critic")
    expected = dict(critic.parameters())
    differing = [name for name, p in restored.parameters() if not torch.equal(whole(p), whole(expected[name]))]
    (folder / f"result-{parallel.rank()}.json").write_text(json.dumps(differing))
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    parallel.leave()
