"""TRL with vLLM inside its process, on a GPU node. Its update is checked before anything is timed, as everybody's is.

vLLM takes one length for all rows of a request, so cases of mixed lengths are refused.
"""

import tempfile
from typing import Any

from torch import Tensor

from tempo_em.throughput import trl
from tempo_em.throughput.turns import Turns
from tempo_em.throughput.work import Case


def run(case: Case, turns: Turns, *, given: bool = False) -> dict[str, Tensor]:
    """As trl.py. Raises ValueError where response lengths differ."""
    if len(set(case.lengths)) > 1:
        raise ValueError("vLLM inside TRL samples all rows to one length; this case has mixed lengths")
    with tempfile.TemporaryDirectory() as folder:  # vLLM loads models from directories
        model: Any = case.load_model()
        model.save_pretrained(folder)
        case.tokenizer().save_pretrained(folder)
        model.name_or_path = model.config._name_or_path = folder
        return trl.run(
            case, turns, given=given, model=model, use_vllm=True, vllm_mode="colocate",
            vllm_importance_sampling_correction=False,  # its pass for old log-probs is work that others do not do
            generation_kwargs={"min_tokens": case.longest}, vllm_gpu_memory_utilization=0.3,
        )  # fmt: skip
