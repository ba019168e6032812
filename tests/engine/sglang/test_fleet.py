"""A real SGLang server on this machine's CPU: what it samples, how weights get there, what happens when it dies."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tempo_engine import weight_sync
from tempo_engine.errors import Halted
from tempo_engine.model import Policy
from tempo_engine.packing import pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.samplers.sglang import SGLangOptions, SGLangSampler
from tempo_engine.sglang.client import Refused
from tempo_engine.sglang.fleet import Fleet, Patience
from tempo_engine.sglang.server import ServerOptions
from tempo_engine.weight_sync import SyncPath, WeightSync
from tempo_engine.weights import create_causal_lm

STOP = 1
SERVER = ServerOptions(dtype="float32", max_running=64, context_length=400, deterministic=True)
PROMPTS = [Prompt(str(i), "", (5 + i, 6, 7, 8)) for i in range(6)]


def qwen3(*, seed: int = 0) -> Policy:
    """Untied, a vocabulary that is no multiple of 64, grouped queries: whatever a server keeps differently."""
    config = {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 50, "tie_word_embeddings": False, "initializer_range": 0.2,
        "max_position_embeddings": 400, "eos_token_id": None, "pad_token_id": 0, "bos_token_id": None,
    }  # fmt: skip
    return Policy(create_causal_lm(config, dtype=torch.float32, attention="sdpa", seed=seed), temperature=0.8)


def sampler_with(options: SGLangOptions, **changes: Any) -> SGLangSampler:
    settings: dict[str, Any] = {"stop_ids": [STOP], "max_new_tokens": 24, "temperature": 0.8} | changes
    return SGLangSampler(options, decode=lambda ids: " ".join(map(str, ids)), **settings)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return qwen3()


@pytest.fixture(scope="module")
def sampler(policy: Policy, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SGLangSampler]:
    torch.set_num_threads(1)
    options = SGLangOptions(server=SERVER, patience=Patience(health=10, update=60, start=240, restarts=2))
    sampler = sampler_with(options)
    sampler.open(tmp_path_factory.mktemp("servers"), policy)
    sampler.load(policy)
    yield sampler
    sampler.close()


@pytest.fixture
def fleet(sampler: SGLangSampler) -> Fleet:
    assert sampler._fleet is not None
    return sampler._fleet


def changed(policy: Policy) -> Policy:
    """The same policy after an update."""
    generator = torch.Generator().manual_seed(policy.version)
    with torch.no_grad():
        for _, p in policy.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    policy.version += 1
    return policy


def gap(policy: Policy, rollouts: list[Rollout]) -> float:
    batch = pack(rollouts)
    return float((policy.token_logprobs(batch, 4096) - batch.sampler_logprob_T).abs().max())


def at_once(sampler: SGLangSampler, prompts: list[Prompt], group_size: int) -> tuple[threading.Thread, list[Rollout]]:
    """A batch that is being sampled on another thread, and where it will be."""
    found: list[Rollout] = []
    thread = threading.Thread(target=lambda: found.extend(sampler.sample(prompts, group_size, key="at once")))
    thread.start()
    return thread, found


# --- Sampling ---


def test_rollouts_are_groups_with_the_log_probs_of_the_policy(sampler: SGLangSampler, policy: Policy) -> None:
    sampler.load(policy)
    rollouts = sampler.sample(PROMPTS, 4, key="k")
    assert [r.prompt for r in rollouts] == [p for p in PROMPTS for _ in range(4)]
    assert gap(policy, rollouts) < 1e-4
    for r in rollouts:
        assert r.versions == ((policy.version, len(r.response_ids)),)
        assert r.is_truncated == (r.response_ids[-1] != STOP)
        assert STOP not in r.response_ids[:-1]
        assert len(r.response_ids) <= 24
        shown = r.response_ids if r.is_truncated else r.response_ids[:-1]
        assert r.text == " ".join(map(str, shown))


def test_every_response_of_a_group_has_a_seed_of_its_own(sampler: SGLangSampler, policy: Policy) -> None:
    sampler.load(policy)
    once, again, other = (
        [tuple(r.response_ids) for r in sampler.sample(PROMPTS[:2], 8, key=key)] for key in ("a", "a", "b")
    )
    assert len(set(once)) > 12
    assert once == again
    assert once != other


def test_the_prompt_of_a_group_is_computed_once(sampler: SGLangSampler, policy: Policy) -> None:
    sampler.load(policy)
    sampler.metrics()
    sampler.sample([Prompt("long", "", (*range(2, 50),) * 4)], 8, key="prefix")
    assert sampler.metrics()["rollout/cached_prompt_share"] > 0.8


def test_truncated_sampling_gives_the_log_probs_of_what_was_left(sampler: SGLangSampler, policy: Policy) -> None:
    sampler.load(policy)
    sampler.top_p, sampler.top_k = 0.7, 5
    try:
        rollouts = sampler.sample(PROMPTS[:2], 4, key="truncated")
    finally:
        sampler.top_p, sampler.top_k = 1.0, 0
    for r in rollouts:
        ids = torch.tensor([*r.prompt.token_ids, *r.response_ids])
        logits = policy.model(input_ids=ids[None]).logits[0, len(r.prompt.token_ids) - 1 : -1] / 0.8
        # Both bounds look at the whole distribution: 5 tokens at most, and none after those that make up 0.7.
        sorted_TV, order_TV = logits.softmax(-1).sort(-1, descending=True)
        is_left_TV = (sorted_TV.cumsum(-1) - sorted_TV <= 0.7) & (torch.arange(50) < 5)
        left_TV = torch.zeros_like(logits).scatter(1, order_TV, sorted_TV * is_left_TV)
        logprob_T = (
            (left_TV / left_TV.sum(-1, keepdim=True)).log().gather(1, torch.tensor(r.response_ids)[:, None])[:, 0]
        )
        torch.testing.assert_close(torch.tensor(r.logprobs), logprob_T.detach(), atol=1e-4, rtol=0)


# --- Weights ---


@pytest.mark.parametrize("path", ["disk", "distributed", "tensor"])
@pytest.mark.parametrize("verify", ["checksum", "probe"])
def test_weights_arrive_on_every_path(
    sampler: SGLangSampler, fleet: Fleet, policy: Policy, tmp_path: Path, monkeypatch: Any, path: SyncPath, verify: Any
) -> None:
    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", 10_000)  # several buckets
    sync = WeightSync(fleet, path, tmp_path, verify=verify)
    sync.push(changed(policy))
    sampler._pushed = policy.version
    assert sync.verify == verify
    assert sync.metrics["repeats"] == 0
    assert sync.metrics["bytes"] == 4 * sum(p.numel() for _, p in policy.parameters())
    rollouts = sampler.sample(PROMPTS, 2, key=path)
    assert {r.versions[0][0] for r in rollouts} == {policy.version}
    assert gap(policy, rollouts) < 1e-4


def corrupting(number_of_times: int) -> Callable[[Any], str]:
    """Instead of `_serialized`: flips the lowest bit of one number of one tensor, so many times."""
    left = [number_of_times]

    def serialized(bucket: Any, send: Any = weight_sync._serialized) -> str:
        sent = []
        for name, x in bucket:
            if name == "model.layers.1.mlp.up_proj.weight" and left[0]:
                left[0] -= 1
                x = x.clone()
                x.view(torch.int32)[3, 5] ^= 1
            sent.append((name, x))
        return send(sent)

    return serialized


def test_a_bit_that_flips_on_the_way_is_found_and_the_update_made_again(
    sampler: SGLangSampler, policy: Policy, monkeypatch: Any
) -> None:
    sampler.load(policy)
    monkeypatch.setattr(weight_sync, "_serialized", corrupting(1))
    sampler.load(changed(policy))
    assert sampler.metrics()["weight_sync/repeats"] == 1
    assert gap(policy, sampler.sample(PROMPTS, 2, key="mended")) < 1e-4


def test_a_tensor_that_never_arrives_stops_the_run_and_is_named(
    sampler: SGLangSampler, policy: Policy, monkeypatch: Any
) -> None:
    monkeypatch.setattr(weight_sync, "_serialized", corrupting(10))
    with pytest.raises(Halted, match=r"other weights than the trainer: model.layers.1.mlp.gate_up_proj.weight$"):
        sampler.load(changed(policy))


def test_log_probs_of_a_probe_betray_wrong_weights(
    fleet: Fleet, sampler: SGLangSampler, policy: Policy, tmp_path: Path, monkeypatch: Any
) -> None:
    def without_last_layer(bucket: Any, send: Any = weight_sync._serialized) -> str:
        return send([(name, x * 0 if "layers.1.mlp" in name else x) for name, x in bucket])

    monkeypatch.setattr(weight_sync, "_serialized", without_last_layer)
    with pytest.raises(Halted, match=r"log-probs of server 0 .* off the trainer's"):
        WeightSync(fleet, "tensor", tmp_path, verify="probe").push(changed(policy))
    sampler._pushed = -1


def test_an_update_that_breaks_off_in_the_middle_is_made_again(
    sampler: SGLangSampler, policy: Policy, monkeypatch: Any
) -> None:
    monkeypatch.setattr(weight_sync, "BUCKET_BYTES", 10_000)
    calls = [0]

    def breaking(bucket: Any, send: Any = weight_sync._serialized) -> str:
        calls[0] += 1
        if calls[0] == 3:
            raise Refused("/update_weights_from_tensor", 400, "no more")
        return send(bucket)

    monkeypatch.setattr(weight_sync, "_serialized", breaking)
    sampler.load(changed(policy))
    assert sampler.metrics()["weight_sync/repeats"] == 1
    assert gap(policy, sampler.sample(PROMPTS, 2, key="whole")) < 1e-4


def test_responses_go_on_with_the_weights_of_an_update_that_interrupts_them(
    sampler: SGLangSampler, fleet: Fleet, policy: Policy, tmp_path: Path
) -> None:
    sampler.load(policy)
    before = qwen3()
    before.model.load_state_dict(policy.model.state_dict())
    old, stop, longest = policy.version, sampler.stop_ids, sampler.max_new_tokens
    sampler.stop_ids, sampler.max_new_tokens = frozenset({49_999}), 380
    try:
        thread, rollouts = at_once(sampler, PROMPTS, 8)
        while not fleet._num_generating:
            time.sleep(0.01)
        time.sleep(0.5)
        WeightSync(fleet, "tensor", tmp_path, interrupts=True).push(changed(policy))
        sampler._pushed = policy.version
        thread.join()
    finally:
        sampler.stop_ids, sampler.max_new_tokens = stop, longest
    mixed = [r for r in rollouts if len(r.versions) == 2]
    assert len(mixed) > 24
    for r in mixed:
        assert [version for version, _ in r.versions] == [old, policy.version]
    by_old, by_new = (p.token_logprobs(pack(mixed), 10**5).split(380) for p in (before, policy))
    for r, old_T, new_T in zip(mixed, by_old, by_new, strict=True):
        change = r.versions[0][1]
        expected_T = torch.cat([old_T[:change], new_T[change:]])
        torch.testing.assert_close(torch.tensor(r.logprobs), expected_T, atol=1e-3, rtol=0)


# --- Faults. The last ones: they wear the server out ---


def sglang_process(fleet: Fleet) -> psutil.Process:
    process = fleet.servers[0].process
    assert process is not None
    return psutil.Process(process.pid).children()[0]


def test_a_killed_server_is_replaced_and_owes_what_it_owed(
    sampler: SGLangSampler, fleet: Fleet, policy: Policy, tmp_path: Path
) -> None:
    sync = WeightSync(
        fleet, "tensor", tmp_path
    )  # the replaced one needs weights on disk; runs with `disk` are killed elsewhere
    sync.push(changed(policy))
    sampler._pushed = policy.version
    sampler.metrics()
    thread, rollouts = at_once(sampler, [Prompt(str(i), "", (2 + i % 40, 3)) for i in range(100)], 4)
    time.sleep(0.3)
    sglang_process(fleet).send_signal(signal.SIGKILL)
    thread.join()
    assert [r.prompt.id for r in rollouts] == [str(i) for i in range(100) for _ in range(4)]
    assert {v for r in rollouts for v, _ in r.versions} == {policy.version}
    assert gap(policy, rollouts) < 1e-4
    assert fleet.num_restarts >= 1
    assert sampler.metrics()["rollout/repeated_requests"] > 0


def test_too_many_deaths_stop_the_run_with_a_sentence(sampler: SGLangSampler, fleet: Fleet, policy: Policy) -> None:
    fleet.patience = replace(fleet.patience, restarts=0)
    sampler.load(policy)
    process = sglang_process(fleet)
    thread, rollouts = at_once(sampler, PROMPTS, 1)
    thread.join()
    assert len(rollouts) == len(PROMPTS)
    process.kill()
    with pytest.raises(Halted, match=r"server 0 .* died"):
        sampler.sample(PROMPTS, 2, key="too late")
    assert not psutil.pid_exists(process.pid) or psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
