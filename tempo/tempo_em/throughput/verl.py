"""verl's PPOTrainer (V1, synchronous, FSDP2 and vLLM), set to the same work: `fit` runs here and waits between its steps; the model
trains, and samples, in processes of Ray's.

Responses get their planned lengths in an agent loop, which is where verl lets its users write their own. Given responses
need no vLLM: then the trainer is alone. What it does beyond the others: rows travel through TransferQueue, metrics (reward,
timing, length statistics).
"""

import importlib
import json
import os
import tempfile
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from tempo_em.throughput.memory import peak, start_peak
from tempo_em.throughput.turns import Enough, Facts, Turns
from tempo_em.throughput.work import CLIP, GPU_SHARE, GROUP_EPS, LEARNING_RATE, MAX_GRAD_NORM, MOST_STEPS, Case, reward


def verl(name: str) -> Any:
    return importlib.import_module(f"verl.{name}")


ray: Any = importlib.import_module("ray")
hydra: Any = importlib.import_module("hydra")
omegaconf: Any = importlib.import_module("omegaconf")
queue: Any = importlib.import_module("transfer_queue")
core, v1 = verl("trainer.ppo.core_algos"), verl("trainer.ppo.v1")
workers, loops = verl("workers.engine_workers"), verl("experimental.agent_loop.agent_loop")
decorator = verl("single_controller.base.decorator")
ON_EVERY_RANK = decorator.register(dispatch_mode=decorator.Dispatch.ONE_TO_ALL)


def run(case: Case, turns: Turns, *, given: bool = False) -> dict[str, Tensor]:
    """Steps until the turns end; returns AdamW's first moments by parameter."""
    with tempfile.TemporaryDirectory() as folder:
        config = settings(case, Path(folder), given)
        environment = verl("trainer.constants_ppo").get_ppo_ray_runtime_env(config)
        # Its processes ask for so many cores in all; Ray waits for ever where there are fewer.
        ray.init(include_dashboard=False, num_cpus=max(16, os.cpu_count() or 1), runtime_env=environment)
        try:
            queue.init(config.transfer_queue)
            trainer = Trainer(case, turns, given, config)
            trainer.init()
            manager = v1.AgentLoopManagerTQ.create(
                config=config, llm_client=trainer.get_llm_client(), teacher_client=None,
                reward_loop_worker_handles=trainer.get_reward_handles(),
            )  # fmt: skip
            with suppress(Enough):
                trainer.fit(manager)
            if not given:
                trainer.checkpoint_manager.sleep_replicas()  # its memory is free before another run begins
            return trainer.on_worker("moments")
        finally:
            queue.close()
            ray.shutdown()


def settings(case: Case, folder: Path, given: bool) -> Any:
    """verl's defaults with ours over them; the model, the questions and the agent loop go into the folder."""
    case.save_model(folder / "model")
    questions, planned = folder / "questions.jsonl", folder / "planned.json"
    rows = [{"prompt": [{"role": "user", "content": ""}], "extra_info": {"index": i}} for i in range(case.num_prompts)]
    questions.write_text("".join(json.dumps({"data_source": "", **row}) + "\n" for row in rows))
    loop = {"name": "planned", "_target_": f"{__name__}.Planned", "case": json.dumps(asdict(case)), "given": given}
    planned.write_text(json.dumps([loop]))
    with hydra.initialize_config_module("verl.trainer.config", version_base=None):
        config = hydra.compose("ppo_trainer")
    omegaconf.OmegaConf.set_struct(config, False)
    config = omegaconf.OmegaConf.merge(config, changes(case, folder, given))
    omegaconf.OmegaConf.resolve(config)
    return config


def changes(case: Case, folder: Path, given: bool) -> dict[str, Any]:
    """In float32 verl has no packed attention, so rows are padded in every case, as TRL's are."""
    files = [str(folder / "questions.jsonl")]
    data = {
        "train_files": files, "val_files": files, "train_batch_size": case.num_prompts, "shuffle": False,
        "dataloader_num_workers": 0, "max_prompt_length": case.prompt_tokens, "max_response_length": case.longest,
    }  # fmt: skip
    model = {
        "path": str(folder / "model"), "use_remove_padding": False, "enable_gradient_checkpointing": False,
        "override_config": {"attn_implementation": "sdpa"},
    }  # fmt: skip
    optim = {
        "lr": LEARNING_RATE, "weight_decay": 0.0, "betas": [0.9, 0.999], "clip_grad": MAX_GRAD_NORM,
        "lr_scheduler_type": "constant", "override_optimizer_config": {"eps": 1e-8, "fused": True},
    }  # fmt: skip
    actor = {
        "strategy": "fsdp2", "ppo_mini_batch_size": case.num_prompts, "ppo_micro_batch_size_per_gpu": case.rows_of_a_part,
        "clip_ratio": CLIP, "clip_ratio_low": CLIP, "clip_ratio_high": CLIP, "loss_agg_mode": "seq-mean-token-mean",
        "grad_clip": MAX_GRAD_NORM, "optim": optim,
        "fsdp_config": {
            "strategy": "fsdp2", "model_dtype": "fp32", "dtype": case.dtype,
            "mixed_precision": {"param_dtype": case.dtype, "reduce_dtype": "float32"},
        },
    }  # fmt: skip
    rollout = {
        "name": "vllm", "n": case.group_size, "dtype": "bfloat16", "tensor_model_parallel_size": 1,
        "gpu_memory_utilization": GPU_SHARE, "checkpoint_engine": {"update_weights_bucket_megabytes": 256},
        "log_prob_micro_batch_size_per_gpu": case.rows_of_a_part, "calculate_log_probs": not given, "nnodes": int(given),
        "agent": {"num_workers": 1, "default_agent_loop": "planned", "agent_loop_config_path": str(folder / "planned.json")},
    }  # fmt: skip
    # Old log-probs are the sampler's: with one update a step nobody else computes them again either.
    algorithm = {"adv_estimator": "grpo_as_trl", "rollout_correction": {"bypass_mode": not given}}
    trainer = {
        "logger": [], "n_gpus_per_node": 1, "nnodes": 1, "val_before_train": False, "test_freq": -1, "save_freq": -1,
        "resume_mode": "disable", "total_training_steps": MOST_STEPS, "total_epochs": MOST_STEPS, "device": case.device.type,
    }  # fmt: skip
    return {
        "data": data, "actor_rollout_ref": {"model": model, "actor": actor, "rollout": rollout}, "algorithm": algorithm,
        "trainer": trainer, "reward": {"num_workers": 1},
        "transfer_queue": {"enable": True, "backend": {"SimpleStorage": {"num_data_storage_units": 1}}},
    }  # fmt: skip


@core.register_adv_est("grpo_as_trl")
def advantages(*, token_level_rewards: Tensor, response_mask: Tensor, index: Any, **_: Any) -> tuple[Tensor, Tensor]:
    """verl's, with TRL's number under the fraction."""
    return core.compute_grpo_outcome_advantage(token_level_rewards, response_mask, index, epsilon=GROUP_EPS)


@cache
def case_of(text: str) -> Case:
    return Case(**json.loads(text))


class Planned:
    """The agent loop: one response of its planned length, sampled by verl's server or given."""

    def __init__(self, case: str, given: bool, server_manager: Any, **_: Any) -> None:
        self.case, self.given, self.server = case_of(case), given, server_manager

    async def run(
        self, sampling_params: dict[str, Any], *, index: int, session_id: int, uid: str, global_steps: int, **_: Any
    ) -> Any:
        row = index * self.case.group_size + session_id
        prompt, length = self.case.prompts[index], self.case.lengths[row]
        if self.given:
            ids, logprobs = self.case.given[row], None
            more = {"min_global_steps": global_steps, "max_global_steps": global_steps}
        else:
            output = await self.server.generate(
                request_id=f"{uid}-{session_id}", prompt_ids=prompt,
                sampling_params=sampling_params | {"max_tokens": length, "ignore_eos": True},
            )  # fmt: skip
            ids, logprobs, more = output.token_ids, output.log_probs, output.extra_fields
        return loops.AgentLoopOutput(
            prompt_ids=prompt, response_ids=ids, response_mask=[1] * len(ids), response_logprobs=logprobs,
            reward_score=reward(ids), num_turns=2, metrics=loops.AgentLoopMetrics(), extra_fields=more,
        )  # fmt: skip


class Observed(workers.ActorRolloutRefWorker):
    """verl's, and what the benchmark asks of it. (A class named Worker is for verl the base of them all.)"""

    @ON_EVERY_RANK
    def moments(self) -> dict[str, Tensor]:
        engine = self.actor.engine
        found = {name: engine.optimizer.state[p]["exp_avg"] for name, p in engine.module.named_parameters()}
        return {name: (x.full_tensor() if isinstance(x, DTensor) else x).cpu() for name, x in found.items()}

    @ON_EVERY_RANK
    def updates(self) -> int:
        """Optimiser steps so far."""
        return max((int(state["step"]) for state in self.actor.engine.optimizer.state.values()), default=0)

    @ON_EVERY_RANK
    def start_peak(self) -> int:
        return start_peak()

    @ON_EVERY_RANK
    def peak(self) -> int:
        return peak()


class Trainer(v1.PPOTrainerSync):
    """Waits between its steps, and notes what was trained on. Without a sampler where responses are given."""

    def __init__(self, case: Case, turns: Turns, given: bool, config: Any) -> None:
        super().__init__(config)
        self.case, self.turns, self.given = case, turns, given
        self._enable_hybrid_replicas = not given  # verl's word for samplers on the trainer's GPUs
        self.replay_buffer.poll_interval = 0.01  # of 2 seconds, which is longer than these steps
        self.updates = 0

    def _init_resource_pool_mgr(self) -> None:
        super()._init_resource_pool_mgr()
        self.role_worker_mapping = {role: ray.remote(Observed) for role in self.role_worker_mapping}

    def on_worker(self, name: str) -> Any:
        return getattr(self.actor_rollout_wg, name)()[0]

    def on_init_end(self) -> None:
        if not self.given:
            super().on_init_end()

    def on_step_begin(self) -> None:
        self.before = self.on_worker("start_peak")
        if not self.turns.go():
            raise Enough

    def on_sample_begin(self) -> None:
        super().on_sample_begin()
        self.began = self.turns.clock()

    def on_sample_end(self) -> None:
        self.turns.generating += self.turns.clock() - self.began
        if not self.given:
            super().on_sample_end()

    def on_step_end(self) -> None:
        if not self.given:
            super().on_step_end()

    def _compute_metrics(self, batch: Any, metrics: dict[str, Any], *arguments: Any, **more: Any) -> None:
        super()._compute_metrics(batch, metrics, *arguments, **more)
        self.turns.done(lambda: self.facts(batch, metrics))

    def facts(self, batch: Any, metrics: dict[str, Any]) -> Facts:
        names = ["prompts", "responses", "response_mask"]
        data = queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
        prompts, responses, masks = (list(data[name].unbind()) for name in names)
        rows = [(prompt.tolist(), int(mask.sum())) for prompt, mask in zip(prompts, masks, strict=True)]
        before, self.updates = self.updates, self.on_worker("updates")
        return Facts(
            rows, sum(map(len, responses)), sum(length for _, length in rows), self.updates - before,
            float(metrics["actor/pg_loss"]), float(metrics["actor/grad_norm"]), self.on_worker("peak") - self.before,
        )  # fmt: skip
