"""TRL with vLLM inside its process, on a GPU node. Its update is checked before anything is timed, as everybody's is.

Given responses need no vLLM. Where weights are float32, vLLM samples in half precision: TRL has no setting for it.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tempo_em.throughput import trl
from tempo_em.throughput.turns import Turns
from tempo_em.throughput.work import GPU_SHARE, Case

# TRL sets these for vLLM and leaves them: a second trainer in the process would take itself for one of several ranks.
OF_RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run(case: Case, turns: Turns, *, given: bool = False) -> dict[str, Tensor]:
    """As trl.py."""
    with tempfile.TemporaryDirectory() as folder:  # vLLM loads models from directories
        model: Any = case.save_model(Path(folder))
        model.name_or_path = model.config._name_or_path = folder
        try:
            return trl.run(
                case, turns, given=given, model=model, kind=Trainer, use_vllm=not given, vllm_mode="colocate",
                vllm_gpu_memory_utilization=GPU_SHARE,
                vllm_importance_sampling_correction=False,  # its pass for old log-probs is work that others do not do
            )  # fmt: skip
        finally:
            for name in OF_RANKS:
                os.environ.pop(name, None)


class Trainer(trl.Trainer):
    """Plans response lengths in vLLM too, for which TRL has one length for all."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if self.use_vllm:
            llm = self.vllm_generation.llm
            llm.generate = planned(llm.generate, self.case)


def planned(generate: Callable[..., Any], case: Case) -> Callable[..., Any]:
    """vLLM's `generate`, every row to its planned length."""

    def rows(prompts: Sequence[Any], sampling_params: Any, **more: Any) -> Any:
        each = [sampling_params.clone() for _ in prompts]
        for parameters, length in zip(each, case.lengths, strict=True):
            parameters.max_tokens, parameters.ignore_eos = length, True
        return generate(prompts, sampling_params=each, **more)

    return rows
