"""A few fixed sequences whose log-probs trainer and server must agree on: proof of weights whose checksums cannot be compared."""

import copy
import random
from dataclasses import dataclass

import torch

from tempo_engine.model import Policy
from tempo_engine.packing import pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.sglang.client import Client

ROWS, TOKENS = 4, 24
# Mean difference that rounding explains, by the dtype of the computation; other weights differ by far more.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float64: 1e-3}


@dataclass(frozen=True)
class Probe:
    """Random tokens, and the policy's log-prob of each but the first."""

    rows: list[list[int]]
    logprobs: list[list[float]]
    tolerance: float

    @staticmethod
    def of(policy: Policy) -> "Probe":
        """Collective."""
        rng = random.Random(0)
        rows = [[rng.randrange(policy.vocab_size) for _ in range(TOKENS)] for _ in range(ROWS)]
        rollouts = [
            Rollout(Prompt("", "", (row[0],)), row[1:], [0.0] * (TOKENS - 1), ((0, TOKENS - 1),), True, "")
            for row in rows
        ]
        plain = copy.copy(policy)
        plain.temperature = 1.0  # servers give log-probs of prompts before the temperature
        logprob_T = plain.token_logprobs(pack(rollouts, policy.device), ROWS * TOKENS)
        return Probe(rows, logprob_T.view(ROWS, TOKENS - 1).tolist(), TOLERANCES[policy.sharding.compute])

    async def difference(self, client: Client, *, seconds: float) -> float:
        """Mean absolute difference of the server's log-probs from the policy's."""
        answers = await client.post(
            "/generate",
            {
                "input_ids": self.rows, "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
                "return_logprob": True, "logprob_start_len": 0,
            },
            seconds=seconds,
        )  # fmt: skip
        theirs = torch.tensor([[x[0] for x in a["meta_info"]["input_token_logprobs"][1:]] for a in answers])
        return float((theirs - torch.tensor(self.logprobs)).abs().mean())
