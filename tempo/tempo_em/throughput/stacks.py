"""The stacks by name, and what each needs to run."""

import importlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[..., dict[str, Tensor]]


class Stack(NamedTuple):
    """`imports`: packages that must be there. `note`: what its side does beyond the others, for the row."""

    module: str
    imports: tuple[str, ...] = ()
    install: str = ""
    needs_gpu: bool = False
    note: str = ""

    def missing(self) -> str:
        """What it lacks here, in one sentence; empty when it can run."""
        lacks = [name for name in self.imports if importlib.util.find_spec(name) is None]
        if lacks:
            return f"not installed: {' and '.join(lacks)}; {self.install}"
        if self.needs_gpu and not torch.cuda.is_available():
            return "needs a GPU, of which there is none here"
        return ""

    def load(self) -> Run:
        return importlib.import_module(f"tempo_em.throughput.{self.module}").run


TRL_NOTE = "TRL also tokenizes its prompts, counts clip ratios and shuffles rows"
VERL_NOTE = "verl also sends its rows through TransferQueue, counts metrics but no entropy; its memory is that of its trainer alone"
GPU_NODES = "it is for GPU nodes, and may have an environment of its own: --python"
AUTHORS_NOTE = (
    "em_token written out on padded batches, not the authors' code; compared are the gradients of value loss and GSPO where values "
    "and ratios have not moved yet"
)
STACKS = {
    "engine": Stack("engine"),
    "trl": Stack("trl", ("trl", "datasets"), "pip install 'tempo-engine[bench]'", note=TRL_NOTE),
    "trl_vllm": Stack("trl_vllm", ("trl", "datasets", "vllm"), GPU_NODES, needs_gpu=True, note=TRL_NOTE),
    "verl": Stack("verl", ("verl", "ray", "vllm", "transfer_queue"), GPU_NODES, needs_gpu=True, note=VERL_NOTE),
    "floor": Stack("floor", note="generate and a padded step by hand, no trainer"),
    "authors": Stack("authors", note=AUTHORS_NOTE),
}
