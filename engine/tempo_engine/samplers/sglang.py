"""The sampler behind which SGLang servers work: token ids go out, token ids with their log-probs come back."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tempo_engine import parallel
from tempo_engine.errors import Halted
from tempo_engine.model import Policy
from tempo_engine.rollout import Prompt, Rollout, response_limits, response_names
from tempo_engine.sglang.fleet import Fleet, Group, Patience, on_all
from tempo_engine.sglang.server import ServerOptions
from tempo_engine.weight_sync import SyncPath, WeightSync
from tempo_engine.weights import save_config

# What a server may give back of a GPU's memory while the trainer works.
MEMORY = ["kv_cache", "weights"]


@dataclass(frozen=True, kw_only=True)
class SGLangOptions:
    """Servers, ours or others' (`urls`), and how weights come to them. See `rollout.sglang` in the recipe.

    `naps`: between batches, servers give back the GPU memory of weights and cache (the trainer works on the same GPUs).
    """

    server: ServerOptions
    patience: Patience
    replicas: int = 1
    urls: tuple[str, ...] = ()
    key: str = ""
    sync: SyncPath = "tensor"
    sync_folder: Path | None = None
    verify: Literal["checksum", "probe", "off"] = "checksum"
    keeps_cache: bool = False
    interrupts: bool = False
    naps: bool = False


class SGLangSampler:
    """Samples through servers; see the Sampler protocol. Between `open` and `close` the main rank holds the connection to them.

    Args as those of LocalSampler. In deterministic mode every response has a seed of its own, from the run's seed, the occasion,
    the prompt and the sample's number; else servers draw as they like.
    """

    def __init__(
        self,
        options: SGLangOptions,
        *,
        stop_ids: Sequence[int],
        decode: Callable[[list[int]], str],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int = 0,
    ) -> None:
        self.options = options
        self.stop_ids = frozenset(stop_ids)
        self.decode = decode
        self.max_new_tokens = max_new_tokens
        self.temperature, self.top_p, self.top_k = temperature, top_p, top_k
        self.seed = seed
        self.num_responses, self.num_tokens = 0, 0
        self.policy: Policy | None = None
        self._fleet: Fleet | None = None
        self._sync: WeightSync | None = None
        self._pushed: int | None = None
        self._released: set[str] = set()
        self._cached, self._prompted = 0, 0

    def open(self, folder: Path, policy: Policy) -> None:
        """Start the servers, without waiting, or join them. Their logs, and weights on their way, are in this folder.

        Collective.
        """
        how = self.options
        if parallel.is_main():
            if how.urls:
                self._fleet = Fleet.at(how.urls, how.key, how.server, how.patience, folder=folder)
            else:
                self._fleet = Fleet(how.server, how.patience, folder=folder, replicas=how.replicas)
            save_config(policy.model, folder / "config")
            self._fleet.start(folder / "config")
        self._sync = WeightSync(
            self._fleet,
            how.sync,
            how.sync_folder or folder / "weights",
            verify=how.verify,
            keeps_cache=how.keeps_cache,
            interrupts=how.interrupts,
        )

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        self._fleet = self._sync = self._pushed = None

    def load(self, policy: Policy) -> None:
        """Give the servers this policy's weights, unless they have this version. Collective."""
        if self._sync is None:
            raise RuntimeError("the servers are not there; call open(folder, policy) first")
        if self.policy is policy and self._pushed == policy.version:
            return
        if self._pushed is None:
            parallel.from_main(self._wait_for_servers)
        self._wake("weights")
        self._sync.push(policy)
        self.policy, self._pushed = policy, policy.version

    def _wait_for_servers(self) -> None:
        assert self._fleet is not None
        self._fleet.wait_until_ready()

    def sample(
        self, prompts: Sequence[Prompt], group_size: int, *, key: str, limits: Sequence[int] | None = None
    ) -> list[Rollout]:
        """`group_size` responses to each prompt, in order; `limits` bounds single ones below `max_new_tokens`. Every rank gets
        them all.

        Raises Halted when too many servers died; RuntimeError when no policy was loaded.
        """
        if self._pushed is None or self._sync is None or self.policy is None:
            raise RuntimeError("the servers have no weights; call load(policy) first")
        names = response_names(prompts, group_size, f"{self.seed}/{key}")
        limits = response_limits(limits, len(names), self.max_new_tokens)
        parameters = [self._parameters(name, limit) for name, limit in zip(names, limits, strict=True)]
        groups = [
            Group(list(p.token_ids), parameters[i * group_size : (i + 1) * group_size]) for i, p in enumerate(prompts)
        ]
        self._wake("weights", "kv_cache")
        while not parallel.from_main(lambda: self._generate(groups)):
            folder = self._sync.save(self.policy)  # a server that died is to begin with them
            if self._fleet is not None:
                self._fleet.run(self._fleet.give_weights(folder))
        self._nap()
        rollouts = parallel.from_main(lambda: [r.to_json() for r in self._rollouts(prompts, groups)])
        self.num_responses += len(rollouts)
        self.num_tokens += sum(len(r["response_ids"]) for r in rollouts)
        return [Rollout.from_json(r) for r in rollouts]

    def _generate(self, groups: list[Group]) -> bool:
        """Whether all is done; if not, a server waits for weights on disk."""
        assert self._fleet is not None
        self._fleet.run(self._fleet.generate(groups))
        return not any(group.owed for group in groups)

    def _parameters(self, name: str, limit: int) -> dict[str, Any]:
        parameters: dict[str, Any] = {
            "max_new_tokens": limit, "temperature": self.temperature, "stop_token_ids": sorted(self.stop_ids),
            "stream_interval": limit,
        }  # fmt: skip
        if not self.stop_ids:  # then nor does the end of sequence of the model's config end a response
            parameters["ignore_eos"] = True
        if self.top_p < 1:
            parameters["top_p"] = self.top_p
        if self.top_k > 0:
            parameters["top_k"] = self.top_k
        if self.options.server.deterministic:
            digest = hashlib.blake2b(name.encode(), digest_size=4).digest()
            parameters["sampling_seed"] = int.from_bytes(digest) >> 1
        return parameters

    def _rollouts(self, prompts: Sequence[Prompt], groups: list[Group]) -> list[Rollout]:
        return [
            self._rollout(prompt, output, parameters["max_new_tokens"])
            for prompt, group in zip(prompts, groups, strict=True)
            for output, parameters in zip(group.outputs, group.parameters, strict=True)
            if output is not None
        ]

    def _rollout(self, prompt: Prompt, output: dict[str, Any], limit: int) -> Rollout:
        """A server's answer, checked: what does not fit together must not be trained on."""
        ids, meta = output["output_ids"], output["meta_info"]
        if "output_token_sampling_logprobs" in meta:  # of the truncated distribution
            logprobs = meta["output_token_sampling_logprobs"]
        else:
            logprobs = [x[0] for x in meta["output_token_logprobs"]]
        spans = tuple((int(span["version"]), span["end"]) for span in meta["weight_versions"])
        whole = 0 < len(ids) <= limit and len(logprobs) == len(ids) == spans[-1][1]
        ends = ids[-1] in self.stop_ids or len(ids) == limit
        if not whole or not ends or not self.stop_ids.isdisjoint(ids[:-1]):
            raise Halted(
                f"a response to {prompt.id} makes no sense: {len(ids)} tokens, {len(logprobs)} log-probs, it ended by "
                f"{meta['finish_reason']}"
            )
        self._cached, self._prompted = self._cached + meta["cached_tokens"], self._prompted + meta["prompt_tokens"]
        is_truncated = ids[-1] not in self.stop_ids
        return Rollout(prompt, ids, logprobs, spans, is_truncated, self.decode(ids if is_truncated else ids[:-1]))

    def metrics(self) -> dict[str, float]:
        """Of the time since the last call: updates of weights, replaced servers, repeated requests, share of prompts from cache."""
        if self._fleet is None or self._sync is None:
            return {}
        fleet = self._fleet
        found = {f"weight_sync/{name}": value for name, value in self._sync.metrics.items()}
        found |= {"rollout/server_restarts": fleet.num_restarts, "rollout/repeated_requests": fleet.num_repeated}
        if self._prompted:
            found["rollout/cached_prompt_share"] = self._cached / self._prompted
        self._sync.metrics, self._cached, self._prompted = {}, 0, 0
        return found

    def ask(self, path: str, payload: dict[str, Any]) -> list[Any]:
        """What every live server answers to a call of ours, its weights in memory; None where it did not. Main rank, while open."""
        fleet = self._fleet
        assert fleet is not None
        self._wake("weights")
        servers = [server for server in fleet.servers if server.is_live]
        return fleet.run(on_all(servers, lambda s: s.client.post(path, payload, seconds=fleet.patience.update)))

    # --- GPUs shared with the trainer ---

    def _nap(self) -> None:
        """Servers give back the memory that the trainer needs."""
        if self.options.naps and self._fleet is not None:
            self._fleet.is_napping = True
            self._memory("release", MEMORY)
            self._released = set(MEMORY)

    def _wake(self, *what: str) -> None:
        """Servers take back the memory that they need for it."""
        if self._fleet is not None and (tags := [tag for tag in what if tag in self._released]):
            self._memory("resume", tags)
            self._released -= set(tags)
            self._fleet.is_napping = bool(self._released)

    def _memory(self, verb: Literal["release", "resume"], tags: list[str]) -> None:
        fleet = self._fleet
        assert fleet is not None
        servers = [server for server in fleet.servers if server.is_live]
        seconds = fleet.patience.update
        fleet.run(
            on_all(servers, lambda s: s.client.post(f"/{verb}_memory_occupation", {"tags": tags}, seconds=seconds))
        )
