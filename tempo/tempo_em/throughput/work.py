"""What every stack does in a step: which model, which prompts, how many responses of which lengths, which loss. All from seeds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from tempo_engine.weights import create_causal_lm, load_causal_lm
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Method = Literal["grpo", "tempo"]
SamplerName = Literal["local", "sglang"]

# AdamW on every side: betas 0.9 and 0.999, eps 1e-8, no decay; the whole gradient is clipped to this norm.
LEARNING_RATE, MAX_GRAD_NORM = 1e-6, 1.0
# More steps than anybody asks for, where a trainer must know how many there are.
MOST_STEPS = 1000
# Of a GPU's memory, for a sampler's weights and cache.
GPU_SHARE = 0.3
# grpo: what is added to a group's standard deviation (TRL's number), and the clip of a token's ratio.
GROUP_EPS, CLIP = 1e-4, 0.2
# tempo: the clips of a response's ratio and of its mean value (the authors').
CLIP_LOW, CLIP_HIGH, VALUE_CLIP = 3e-4, 5e-4, 0.1


@dataclass(frozen=True)
class Case:
    """One step, in fields that travel as JSON: Case("tiny", {"model_type": "qwen3", ...}, 4, 8, 32, [64] * 32).

    `model` is a config of a fresh model, or a Hugging Face directory. `lengths` are the planned tokens of each response, the end
    of sequence included, in order of rows: each prompt `group_size` times in a row. With method tempo the second half of the
    prompts is labelled. A backward pass takes a `parts`-th of the rows, or as many tokens as these have when they are padded.
    `sampler` is the engine's: other stacks have their own.
    """

    name: str
    model: dict[str, Any] | str
    num_prompts: int
    group_size: int
    prompt_tokens: int
    lengths: list[int]
    dtype: str = "float32"
    parts: int = 1
    method: Method = "grpo"
    sampler: SamplerName = "local"

    def __post_init__(self) -> None:
        if len(self.lengths) != self.num_rows:
            raise ValueError(f"{self.num_rows} rows have {self.num_rows} planned lengths, got {len(self.lengths)}")
        if self.num_rows % self.parts:
            raise ValueError(f"{self.num_rows} rows cannot be cut into {self.parts} equal parts")

    @property
    def num_rows(self) -> int:
        return self.num_prompts * self.group_size

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def rows_of_a_part(self) -> int:
        return self.num_rows // self.parts

    @property
    def micro_batch_tokens(self) -> int:
        return self.rows_of_a_part * (self.prompt_tokens + self.longest)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load_model(self) -> PreTrainedModel:
        """The same weights in every process, float32 whatever the dtype of the computation. No dropout."""
        if isinstance(self.model, str):
            return load_causal_lm(Path(self.model), dtype=torch.float32, attention="sdpa").eval()
        return create_causal_lm(self.model, dtype=torch.float32, attention="sdpa", seed=0).eval()

    def save_model(self, folder: Path) -> PreTrainedModel:
        """The same as a Hugging Face directory with the tokenizer."""
        model: Any = self.load_model()
        model.save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)
        return model

    @cached_property
    def vocab_size(self) -> int:
        if isinstance(self.model, str):
            from transformers import AutoConfig

            return AutoConfig.from_pretrained(self.model, local_files_only=True).vocab_size
        return self.model["vocab_size"]

    @property
    def eos_id(self) -> int:
        return self.vocab_size - 1

    @property
    def pad_id(self) -> int:
        return self.vocab_size - 2

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Token ids; neither end of sequence nor padding is among them."""
        rng = random.Random(1)
        return [[rng.randrange(self.pad_id) for _ in range(self.prompt_tokens)] for _ in range(self.num_prompts)]

    @cached_property
    def row_prompts(self) -> list[list[int]]:
        return [prompt for prompt in self.prompts for _ in range(self.group_size)]

    @cached_property
    def given(self) -> list[list[int]]:
        """Responses of the planned lengths, for checks in which nothing is sampled. The last token is the end of sequence."""
        rng = random.Random(2)
        return [[rng.randrange(self.pad_id) for _ in range(length - 1)] + [self.eos_id] for length in self.lengths]

    @property
    def group_of_row(self) -> Tensor:
        return torch.arange(self.num_rows) // self.group_size

    @property
    def is_labelled_row(self) -> Tensor:
        return self.group_of_row >= self.num_prompts // 2

    @cached_property
    def value_head(self) -> Tensor:
        """The critic's first weights, [D]. Not zero, or no gradient would reach its trunk."""
        size = self.load_model().config.hidden_size
        return torch.randn(size, generator=torch.Generator().manual_seed(3)) / size**0.5

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Texts are token ids in decimal, with spaces between them: what is text on its way comes back as the same ids."""
        vocabulary = {str(i): i for i in range(self.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=str(self.pad_id)))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=str(self.eos_id), pad_token=str(self.pad_id), padding_side="left"
        )


def reward(response_ids: Sequence[int]) -> float:
    """The share of even token ids."""
    return sum(token % 2 == 0 for token in response_ids) / len(response_ids)


def label(response_ids: Sequence[int]) -> float:
    """What a verifier would say of a response, -1 or 1: whether most of its token ids are even."""
    return 1.0 if reward(response_ids) > 0.5 else -1.0
