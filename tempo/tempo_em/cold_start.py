"""Supervised cold start: worked responses written by the task, so that a fresh model has something to reinforce."""

import random
from dataclasses import dataclass
from typing import Any

from tempo_engine.model import Policy
from tempo_engine.optim import Optimizer
from tempo_engine.packing import PackedBatch, pack
from tempo_engine.rollout import Prompt, Rollout
from tempo_engine.tasks.question import Generator, Question, split_of
from tempo_engine.updates import imitate

from tempo_em.recipe import Recipe

# Steps between two lines of the log; checkpoints fall between them.
STEPS_PER_ITERATION = 20


@dataclass
class ColdStart:
    """Steps of imitation on fresh questions of the labelled split: unlabelled and held-out questions never occur in it."""

    recipe: Recipe
    generator: Generator
    tokenizer: Any
    policy: Policy
    optimizer: Optimizer
    not_to_be_seen: frozenset[str]

    @property
    def iterations(self) -> int:
        return -(-self.recipe.cold_start.steps // STEPS_PER_ITERATION)

    def iterate(self, iteration: int) -> dict[str, float]:
        first = iteration * STEPS_PER_ITERATION
        metrics: dict[str, float] = {}
        trained = 0
        for step in range(first, min(first + STEPS_PER_ITERATION, self.recipe.cold_start.steps)):
            batch = self.batch(step)
            metrics = imitate(self.policy, self.optimizer, batch, micro_batch_tokens=self.recipe.micro_batch_tokens)
            trained += int(batch.cu_responses_S1[-1])
        return metrics | {"tokens/trained_policy": trained}

    def batch(self, step: int) -> PackedBatch:
        """The traces of one step, the same for the same seed and step."""
        how = self.recipe.cold_start
        rng = random.Random(f"{self.recipe.seed}/cold_start/{step}")
        kinds = rng.choices(list(how.mix), weights=list(how.mix.values()), k=how.batch_size)
        questions = [self._question(row, rng) for row in range(how.batch_size)]
        traces = [self.generator.trace(q, kind, rng) for q, kind in zip(questions, kinds, strict=True)]
        texts = [question.shown or str(question.content) for question in questions]
        prompt_ids = self.tokenizer(texts)["input_ids"]
        trace_ids = self.tokenizer(traces, add_special_tokens=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        return pack(
            [
                Rollout(Prompt(q.id, text, tuple(p)), [*t, end], [0.0] * (len(t) + 1), (), False, trace)
                for q, text, p, t, trace in zip(questions, texts, prompt_ids, trace_ids, traces, strict=True)
            ],
            self.policy.device,
        )

    def _question(self, row: int, rng: random.Random) -> Question:
        while True:
            question = self.generator.draw(row, rng)
            if split_of(question) == "labelled" and question.id not in self.not_to_be_seen:
                return question
