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


TRL_NOTE = "TRL also turns ids into text and back, counts clip ratios and shuffles rows"
STACKS = {
    "engine": Stack("engine"),
    "trl": Stack("trl", ("trl", "datasets"), "pip install 'tempo-engine[bench]'", note=TRL_NOTE),
    "floor": Stack("floor", note="generate and a padded step by hand, no trainer"),
    "authors": Stack("authors", note="em_token written out in PyTorch, padded; not the authors' code"),
}
