"""The in-process sampler: batched decoding with a KV cache, on whatever device the policy is on.

Three things make it cheaper than padding everything to the end: the prompt of a group is computed once for its n responses,
finished sequences leave the batch, and waiting prompts take their place.
"""

# Shape letters: P = prompts, R = running sequences, L = cached positions, M = longest response, V = vocabulary
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from tempo_engine import parallel
from tempo_engine.model import Policy
from tempo_engine.rollout import Prompt, Rollout, response_limits, response_names

# Rows leave the cache (a copy of what stays) once this share of the batch has finished, so copies cost a bounded fraction.
FINISHED_SHARE = 1 / 8


class LocalSampler:
    """Samples from the policy it was last given; see the Sampler protocol.

    Args:
        stop_ids: token ids that end a response (they stay in it). decode: token ids -> text.
        max_new_tokens: bound on a response, the stop token included; a response that reaches it is truncated.
        max_running: how many sequences decode at a time (at least one group does).
        seed: with the occasion's key, the prompt and the sample's number it fixes every draw, so a response's draws do not depend
            on which others share its batch.
    """

    def __init__(
        self,
        *,
        stop_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        max_running: int = 512,
        seed: int = 0,
    ) -> None:
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.max_running = max_running
        self.seed = seed
        self.policy: Policy | None = None
        self.version = -1
        self.num_responses, self.num_tokens = 0, 0

    def load(self, policy: Policy) -> None:
        """Sample from this policy at its present version. The weights are shared, not copied."""
        self.policy, self.version = policy, policy.version

    def open(self, folder: Path, policy: Policy) -> None:
        """There is nothing to start."""

    def close(self) -> None:
        """Nor to stop."""

    def metrics(self) -> dict[str, float]:
        return {}

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Prompt], group_size: int, *, key: str, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        """`group_size` responses to each prompt, in order. `limits` bounds single responses below `max_new_tokens`.

        Raises RuntimeError when no policy was loaded, or when it was updated since: its weights would not be the version that
        the rollouts claim.
        """
        policy = self.policy
        if policy is None or policy.version != self.version:
            raise RuntimeError(f"the sampler holds version {self.version}; call load(policy) after every update")
        names = response_names(prompts, group_size, f"{self.seed}/{key}")
        limits = response_limits(limits, len(names), self.max_new_tokens)

        def sample_groups(share: list[int]) -> list[list[tuple[list[int], list[float], str]]]:
            slots = [row * group_size + i for row in share for i in range(group_size)]
            done = self._decode(
                policy,
                [prompts[row] for row in share],
                group_size,
                [names[i] for i in slots],
                [limits[i] for i in slots],
            )
            return [done[i : i + group_size] for i in range(0, len(done), group_size)]

        with parallel.gathered(policy.scope, policy.sharding):
            groups = parallel.together([len(p.token_ids) + self.max_new_tokens for p in prompts], sample_groups)
        rollouts = [
            Rollout(prompt, ids, logprobs, ((self.version, len(ids)),), ids[-1] not in self.stop_ids, text)
            for prompt, group in zip(prompts, groups, strict=True)
            for ids, logprobs, text in group
        ]
        self.num_responses += len(rollouts)
        self.num_tokens += sum(len(rollout.response_ids) for rollout in rollouts)
        return rollouts

    def _decode(
        self, policy: Policy, prompts: Sequence[Prompt], group_size: int, names: list[str], limits: list[int]
    ) -> list[tuple[list[int], list[float], str]]:
        """Ids, log-probs and text of every response, in order; `names` fixes the draws of each, `limits` bounds its length."""
        draws = self._draws(names)
        # Longest prompt first, so that neighbours need little padding.
        waiting = deque(sorted(range(len(prompts)), key=lambda row: -len(prompts[row].token_ids)))
        running = _Running(policy, torch.tensor(sorted(self.stop_ids), device=policy.device), self.max_new_tokens)
        done: dict[int, tuple[list[int], list[float]]] = {}
        while waiting or len(running):
            # Joining costs a prefill and a copy of the cache: wait until half of the places are free.
            if waiting and (not len(running) or (running.can_join and len(running) <= self.max_running // 2)):
                count = max(1, (self.max_running - len(running)) // group_size)
                rows = [waiting.popleft() for _ in range(min(count, len(waiting)))]
                slots = [row * group_size + i for row in rows for i in range(group_size)]
                running.join(
                    [prompts[row] for row in rows], group_size, slots, draws[slots], [limits[i] for i in slots]
                )
            logits_RV = truncate(running.logits_RV / self.temperature, self.top_p, self.top_k)
            done |= running.append(*draw(logits_RV, running.next_draws()))
            running.drop_finished()
            if len(running):
                running.decode()
        return [(*done[slot], self._text(done[slot][0])) for slot in range(len(names))]

    def _draws(self, names: Sequence[str]) -> Tensor:
        """Uniform random numbers, one row a response and one column a token, [R, M] float64."""
        draws = np.empty((len(names), self.max_new_tokens))
        for row, name in enumerate(names):
            digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
            philox = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))
            np.random.Generator(philox).random(out=draws[row])
        return torch.from_numpy(draws)

    def _text(self, ids: list[int]) -> str:
        return self.decode(ids[:-1] if ids[-1] in self.stop_ids else ids)


def truncate(logits_RV: Tensor, top_p: float, top_k: int) -> Tensor:
    """Logits with everything outside the nucleus (top_p) and the k largest (top_k, 0 = off) set to -inf."""
    if top_k > 0:
        kth_R1 = logits_RV.topk(min(top_k, logits_RV.shape[-1]), dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < kth_R1, -torch.inf)
    if top_p < 1.0:
        sorted_RV, order_RV = logits_RV.sort(dim=-1, descending=True)
        probability_RV = sorted_RV.softmax(-1)
        is_outside_RV = probability_RV.cumsum(-1) - probability_RV >= top_p
        logits_RV = logits_RV.masked_fill(
            torch.zeros_like(is_outside_RV).scatter(1, order_RV, is_outside_RV), -torch.inf
        )
    return logits_RV


def draw(logits_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row by inverting the cumulative distribution at `uniform_R`, with its log-prob; [R] int64 and [R] float32."""
    logprob_RV = logits_RV.log_softmax(-1)
    # float64: over a large vocabulary a float32 running sum would lose the rare tokens.
    cumulative_RV = logprob_RV.double().exp().cumsum(-1)
    threshold_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    token_R1 = torch.searchsorted(cumulative_RV, threshold_R1, right=True).clamp(max=logits_RV.shape[1] - 1)
    return token_R1[:, 0], logprob_RV.gather(1, token_R1)[:, 0]


class _Running:
    """The sequences that decode together: their KV cache (padded on the left), and one row of every tensor per sequence."""

    def __init__(self, policy: Policy, stop_ids: Tensor, max_new_tokens: int) -> None:
        self.policy = policy
        self.stop_ids = stop_ids
        device = policy.device
        self.cache: Any = None
        self.logits_RV = torch.empty(0, policy.vocab_size, dtype=policy.precision, device=device)
        self.mask_RL = torch.empty(0, 0, dtype=torch.int64, device=device)
        self.token_RM = torch.empty(0, max_new_tokens, dtype=torch.int64, device=device)
        self.logprob_RM = torch.empty(0, max_new_tokens, dtype=policy.precision, device=device)
        self.draws_RM = torch.empty(0, max_new_tokens, dtype=torch.float64, device=device)
        # Columns: where the result goes, tokens so far, bound on tokens, finished or not.
        self.slot_R, self.length_R, self.limit_R, self.finished_R = torch.empty(4, 0, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.slot_R)

    @property
    def can_join(self) -> bool:
        """Sequences of different ages can share plain key/value layers; sliding windows and recurrent states cannot be merged."""
        return self.cache is None or all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def join(self, prompts: list[Prompt], group_size: int, slots: list[int], draws: Tensor, limits: list[int]) -> None:
        """Compute each prompt once and let its whole group start from there."""
        device = self.policy.device
        longest = max(len(p.token_ids) for p in prompts)
        padding = [longest - len(p.token_ids) for p in prompts]
        ids_PL = torch.tensor(
            [[0] * n + list(p.token_ids) for n, p in zip(padding, prompts, strict=True)], device=device
        )
        mask_PL = torch.tensor([[0] * n + [1] * (longest - n) for n in padding], device=device)
        cache = DynamicCache(config=self.policy.model.config)
        logits_PV = self._forward(ids_PL, (mask_PL.cumsum(1) - 1).clamp(min=0), mask_PL, cache)
        cache.batch_repeat_interleave(group_size)
        mask_RL = mask_PL.repeat_interleave(group_size, 0)
        self.mask_RL = _merge(self.cache, self.mask_RL, cache, mask_RL) if len(self) else mask_RL
        self.cache = self.cache if len(self) else cache
        rows = len(slots)
        self.logits_RV = torch.cat([self.logits_RV, logits_PV.repeat_interleave(group_size, 0)])
        self.draws_RM = torch.cat([self.draws_RM, draws.to(device)])
        self.token_RM = torch.cat([self.token_RM, self.token_RM.new_zeros(rows, self.token_RM.shape[1])])
        self.logprob_RM = torch.cat([self.logprob_RM, self.logprob_RM.new_zeros(rows, self.logprob_RM.shape[1])])
        self.slot_R = torch.cat([self.slot_R, torch.tensor(slots, device=device)])
        self.limit_R = torch.cat([self.limit_R, torch.tensor(limits, device=device)])
        self.length_R = torch.cat([self.length_R, self.length_R.new_zeros(rows)])
        self.finished_R = torch.cat([self.finished_R, self.finished_R.new_zeros(rows)])

    def _forward(self, ids: Tensor, position_ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
        hidden = self.policy.trunk(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return self.policy.logits(hidden[:, -1])

    def next_draws(self) -> Tensor:
        column_R1 = self.length_R.clamp(max=self.draws_RM.shape[1] - 1)[:, None]
        return self.draws_RM.gather(1, column_R1)[:, 0]

    def append(self, token_R: Tensor, logprob_R: Tensor) -> dict[int, tuple[list[int], list[float]]]:
        """One more token for every unfinished sequence; returns slot -> (ids, log-probs) of those that end with it."""
        live_R = self.finished_R == 0
        rows, columns = live_R.nonzero()[:, 0], self.length_R[live_R]
        self.token_RM[rows, columns] = token_R[live_R]
        self.logprob_RM[rows, columns] = logprob_R[live_R]
        self.length_R[live_R] += 1
        ends_R = live_R & (torch.isin(token_R, self.stop_ids) | (self.length_R >= self.limit_R))
        self.finished_R[ends_R] = 1
        ended = ends_R.nonzero()[:, 0].tolist()
        slots, lengths = self.slot_R.tolist(), self.length_R.tolist()
        return {
            slots[row]: (self.token_RM[row, : lengths[row]].tolist(), self.logprob_RM[row, : lengths[row]].tolist())
            for row in ended
        }

    def drop_finished(self) -> None:
        """Finished rows leave once they are a fair share of the batch; until then they decode along, unread."""
        if self.finished_R.sum() < max(1, FINISHED_SHARE * len(self)):
            return
        rows = (self.finished_R == 0).nonzero()[:, 0]
        if len(rows):
            self.cache.batch_select_indices(rows)
        self.mask_RL = self.mask_RL[rows]
        for name in ("token_RM", "logprob_RM", "draws_RM", "slot_R", "length_R", "limit_R", "finished_R", "logits_RV"):
            setattr(self, name, getattr(self, name)[rows])

    def decode(self) -> None:
        """Feed the last token of every sequence and keep the logits of the next one."""
        last_R1 = self.token_RM.gather(1, (self.length_R - 1)[:, None])
        position_R1 = self.mask_RL.sum(1, keepdim=True)
        self.mask_RL = torch.cat([self.mask_RL, self.mask_RL.new_ones(len(self), 1)], dim=1)
        self.logits_RV = self._forward(last_R1, position_R1, self.mask_RL, self.cache)


def _merge(cache: Any, mask_RL: Tensor, new_cache: Any, new_mask_RL: Tensor) -> Tensor:
    """Append the rows of `new_cache` to `cache` (in place), both padded on the left to the longer; returns the merged mask.

    Columns that only sequences long gone had used are cut off first.
    """
    used = int(mask_RL.any(0).nonzero()[0])
    mask_RL = mask_RL[:, used:]
    length = max(mask_RL.shape[1], new_mask_RL.shape[1])

    def pad(x: Tensor, dim: int) -> Tensor:
        shape = list(x.shape)
        shape[dim] = length - x.shape[dim]
        return x if shape[dim] == 0 else torch.cat([x.new_zeros(shape), x], dim=dim)

    for layer, new_layer in zip(cache.layers, new_cache.layers, strict=True):
        layer.keys = torch.cat([pad(layer.keys[:, :, used:], 2), pad(new_layer.keys, 2)])
        layer.values = torch.cat([pad(layer.values[:, :, used:], 2), pad(new_layer.values, 2)])
    return torch.cat([pad(mask_RL, 1), pad(new_mask_RL, 1)])
