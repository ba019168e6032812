"""TRL's GRPOTrainer, set to the same work: `trainer.train()` runs, and waits between its steps.

What it does beyond: it tokenizes its prompts, counts metrics (clip ratios, reward statistics) and shuffles rows.
"""

import importlib
import tempfile
from contextlib import suppress
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from tempo_em.throughput.plain import processors
from tempo_em.throughput.turns import Enough, Facts, Turns
from tempo_em.throughput.work import CLIP, LEARNING_RATE, MAX_GRAD_NORM, MOST_STEPS, Case, reward

trl: Any = importlib.import_module("trl")
datasets: Any = importlib.import_module("datasets")


def run(
    case: Case, turns: Turns, *, given: bool = False, model: Any = None, kind: Any = None, **more: Any
) -> dict[str, Tensor]:
    """Steps until the turns end; returns AdamW's first moments by parameter.

    `model`: if not a fresh one of the case. `kind` of trainer: if not this one. `more`: further settings of GRPOConfig.
    """
    texts = [" ".join(map(str, ids)) for ids in case.prompts]
    model = model or case.load_model()
    with tempfile.TemporaryDirectory() as folder:
        trainer = (kind or Trainer)(
            case, turns, given,
            model=model,
            reward_funcs=lambda completion_ids, **_: [reward(ids) for ids in completion_ids],
            args=settings(case, folder, **more),
            train_dataset=datasets.Dataset.from_dict({"prompt": texts * MOST_STEPS}),
            processing_class=case.tokenizer(),
        )  # fmt: skip
        with suppress(Enough):
            trainer.train()
    state = trainer.optimizer.state
    return {name: state[p]["exp_avg"] for name, p in trainer.model.named_parameters() if p in state}


def settings(case: Case, folder: str, **more: Any) -> Any:
    return trl.GRPOConfig(
        output_dir=folder, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        use_cpu=case.device.type == "cpu", bf16=case.dtype == "bfloat16", gradient_checkpointing=False,
        per_device_train_batch_size=case.rows_of_a_part, gradient_accumulation_steps=case.parts,
        steps_per_generation=case.parts, num_generations=case.group_size, num_iterations=1, max_steps=MOST_STEPS,
        max_completion_length=case.longest, shuffle_dataset=False, seed=0,
        beta=0.0, loss_type="grpo", epsilon=CLIP, scale_rewards="group", temperature=1.0, top_p=1.0, top_k=0,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM, optim="adamw_torch_fused", adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8,
        **more,
    )  # fmt: skip


class Trainer(trl.GRPOTrainer):
    """Plans response lengths, and notes what is trained on."""

    def __init__(self, case: Case, turns: Turns, given: bool, **arguments: Any) -> None:
        super().__init__(callbacks=[Waiting(self, turns)], **arguments)
        self.case, self.turns, self.given = case, turns, given
        self.generate = self.model.generate
        self.model.generate = self.planned
        self.clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self.clipped
        self.forget()

    def forget(self) -> None:
        """What the last step did."""
        self.rows: list[tuple[Tensor, Tensor, Tensor]] = []
        self.generated, self.updates, self.loss, self.norm = 0, 0, 0.0, 0.0

    def planned(self, **arguments: Any) -> Any:
        """transformers' `generate`, every row to its planned length."""
        return self.generate(**arguments, logits_processor=processors(self.case))

    def clipped(self, *arguments: Any, **more: Any) -> Any:
        self.norm = self.clip(*arguments, **more)
        return self.norm

    def _generate_single_turn(self, prompt_ids: Any, *arguments: Any, **more: Any) -> Any:
        if [list(ids) for ids in prompt_ids] != self.case.row_prompts:
            raise RuntimeError("TRL asks for other rows than planned: each prompt's responses should follow each other")
        with self.turns.generation():
            if self.given:
                return self.case.given, None
            return super()._generate_single_turn(prompt_ids, *arguments, **more)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        self.generated += sum(map(len, completion_ids_list))
        return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        prompts, masks, responses = inputs["prompt_ids"], inputs["prompt_mask"], inputs["completion_mask"]
        self.rows += zip(prompts, masks, responses, strict=True)
        loss = super()._compute_loss(model, inputs)
        self.loss += loss.detach()
        return loss

    def facts(self) -> Facts:
        rows = [(prompt[mask.bool()].tolist(), int(response.sum())) for prompt, mask, response in self.rows]
        trained = sum(length for _, length in rows)
        return Facts(rows, self.generated, trained, self.updates, float(self.loss), float(self.norm))


class Waiting(TrainerCallback):
    """Between two steps: says how the last one went, and waits for the next."""

    def __init__(self, trainer: Trainer, turns: Turns) -> None:
        self.trainer, self.turns = trainer, turns

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.turns.done(self.trainer.facts)
        self.trainer.forget()
        if not self.turns.go():
            raise Enough

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.updates += 1
