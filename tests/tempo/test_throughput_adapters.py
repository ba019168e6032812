"""The adapters for GPU nodes, without the stacks: what they ask of a server, and what they say of a step.

verl, Ray, TransferQueue and TRL are stand-ins. Whether verl's own trainer computes the same gradients is checked by the benchmark.
"""

import asyncio
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from tempo_em.throughput import cases
from tempo_em.throughput.turns import Turns
from tempo_em.throughput.work import Case, reward

CASE = Case("small", cases.qwen3(64, 1, 97), 2, 2, 3, [5, 3, 4, 2])


class StandIn(ModuleType):
    """A module that has whatever it is asked for: a class where one may be derived from."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in ("ActorRolloutRefWorker", "PPOTrainerSync", "GRPOTrainer"):
            return type(name, (), {"_compute_metrics": lambda self, *arguments, **more: None})
        if name in ("AgentLoopOutput", "AgentLoopMetrics"):
            return SimpleNamespace
        return lambda *arguments, **more: lambda function: function  # decorators that take arguments

    Dispatch = SimpleNamespace(ONE_TO_ALL=None)


@pytest.fixture
def trl_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("trl", "datasets"):
        monkeypatch.setitem(sys.modules, name, StandIn(name))
    yield importlib.import_module("tempo_em.throughput.trl_vllm")
    del sys.modules["tempo_em.throughput.trl"], sys.modules["tempo_em.throughput.trl_vllm"]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    names = (
        "trainer.ppo.core_algos", "trainer.ppo.v1", "workers.engine_workers", "experimental.agent_loop.agent_loop",
        "single_controller.base.decorator",
    )  # fmt: skip
    for name in ("ray", "hydra", "omegaconf", "transfer_queue", "verl", *(f"verl.{name}" for name in names)):
        monkeypatch.setitem(sys.modules, name, StandIn(name))
    module = importlib.import_module("tempo_em.throughput.verl")
    yield module
    del sys.modules["tempo_em.throughput.verl"]


def test_vllm_gives_every_row_of_trls_its_planned_length(trl_vllm: Any) -> None:
    class Parameters(SimpleNamespace):
        def clone(self) -> "Parameters":
            return Parameters(**vars(self))

    asked: dict[str, Any] = {}
    generate = trl_vllm.planned(lambda prompts, **more: asked.update(more, prompts=prompts), CASE)
    one = Parameters(temperature=1.0, max_tokens=5, ignore_eos=False)
    generate(["a", "b", "c", "d"], sampling_params=one, use_tqdm=False)
    assert [parameters.max_tokens for parameters in asked["sampling_params"]] == CASE.lengths
    assert all(parameters.ignore_eos and parameters.temperature == 1.0 for parameters in asked["sampling_params"])
    assert (one.max_tokens, asked["prompts"], asked["use_tqdm"]) == (5, ["a", "b", "c", "d"], False)


def respond(adapter: Any, *, given: bool, index: int, session_id: int) -> tuple[Any, list[dict[str, Any]]]:
    """What the agent loop answers, and what it asked the server for."""
    asked: list[dict[str, Any]] = []

    async def generate(**request: Any) -> Any:
        asked.append(request)
        return SimpleNamespace(
            token_ids=[7] * request["sampling_params"]["max_tokens"], log_probs=[-1.0], extra_fields={}
        )

    loop = adapter.Planned(json.dumps(asdict(CASE)), given, SimpleNamespace(generate=generate), tokenizer=None)
    run = loop.run({"temperature": 1.0}, index=index, session_id=session_id, uid="u", global_steps=9, raw_prompt=[])
    return asyncio.run(run), asked


def test_every_row_is_asked_for_with_its_planned_length_whatever_ends_it(adapter: Any) -> None:
    output, (request,) = respond(adapter, given=False, index=1, session_id=1)
    assert request["prompt_ids"] == CASE.prompts[1]
    assert request["sampling_params"] == {
        "temperature": 1.0,
        "max_tokens": 2,
        "ignore_eos": True,
    }  # the last of the lengths
    assert (output.response_ids, output.response_mask, output.reward_score) == ([7, 7], [1, 1], 0.0)


def test_given_responses_ask_no_server(adapter: Any) -> None:
    output, asked = respond(adapter, given=True, index=1, session_id=0)
    assert asked == []
    assert (output.prompt_ids, output.response_ids) == (CASE.prompts[1], CASE.given[2])
    assert output.reward_score == reward(CASE.given[2])
    assert output.extra_fields == {"min_global_steps": 9, "max_global_steps": 9}  # verl counts how old rows are


def test_settings_say_the_same_work_as_the_case(adapter: Any, tmp_path: Any) -> None:
    found = adapter.changes(CASE, tmp_path, given=False)
    actor, rollout = (found["actor_rollout_ref"][name] for name in ("actor", "rollout"))
    assert (actor["ppo_mini_batch_size"], actor["ppo_micro_batch_size_per_gpu"], rollout["n"]) == (
        2,
        4,
        2,
    )  # one update of all rows
    assert actor["fsdp_config"]["mixed_precision"]["param_dtype"] == "float32"  # verl's own default is bfloat16
    assert found["algorithm"]["rollout_correction"]["bypass_mode"]  # nobody computes old log-probs again
    assert not adapter.changes(CASE, tmp_path, given=True)["algorithm"]["rollout_correction"][
        "bypass_mode"
    ]  # given ones have none


def test_a_step_says_what_verl_trained_on_and_what_its_process_held(
    adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {
        "prompts": torch.nested.nested_tensor([[1, 2, 3], [4, 5, 6]], layout=torch.jagged),
        "responses": torch.nested.nested_tensor([[7, 8], [9]], layout=torch.jagged),
        "response_mask": torch.nested.nested_tensor([[1, 0], [1]], layout=torch.jagged),
    }
    monkeypatch.setattr(adapter.queue, "kv_batch_get", lambda **_: data, raising=False)
    told: list[dict[str, Any]] = []
    trainer = adapter.Trainer.__new__(adapter.Trainer)
    trainer.turns, trainer.updates, trainer.given = Turns(["go"], told.append), 0, True
    answers = {"start_peak": 100, "updates": 1, "peak": 350}
    trainer.actor_rollout_wg = SimpleNamespace(**{name: lambda x=x: [x] for name, x in answers.items()})
    trainer.on_step_begin()
    metrics = {"actor/pg_loss": 0.5, "actor/grad_norm": 2.0}
    trainer._compute_metrics(SimpleNamespace(keys=[], partition_id="train"), metrics, {}, global_steps=1, epoch=0)
    (step,) = told
    assert (step["generated"], step["trained"], step["updates"]) == (3, 2, 1)
    assert (step["loss"], step["grad_norm"], step["peak_bytes"]) == (0.5, 2.0, 250)
    with pytest.raises(adapter.Enough):
        trainer.on_step_begin()
