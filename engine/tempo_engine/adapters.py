"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: trained beside weights that stay as they are."""

import hashlib
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from tempo_engine import parallel
from tempo_engine.errors import UserError, first_sentence


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of `rank` on the `targets`, scaled by alpha / rank. `seed` fixes their first values."""

    rank: int
    alpha: float
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    seed: int = 0


def add_adapters(model: PreTrainedModel, how: Lora) -> None:
    """Wrap the target layers, in place; everything else is frozen. `start_adapters` gives the adapters their values.

    Raises UserError when peft is missing or finds no such layers.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("model.lora needs the package peft: pip install 'tempo-engine[lora]'") from error
    targets = how.targets if isinstance(how.targets, str) else list(how.targets)
    config = LoraConfig(r=how.rank, lora_alpha=how.alpha, target_modules=targets, lora_dropout=0.0)  # pyright: ignore
    try:
        with next(model.parameters()).device:
            inject_adapter_in_model(config, model)
    except ValueError as error:
        raise UserError(f"model.lora.targets {how.targets}: {first_sentence(error)}") from error
    for name, parameter in model.named_parameters():
        if is_adapter(name):  # peft makes them float32
            parameter.data = parameter.data.to(model.dtype)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def file_name(name: str) -> str:
    """A weight's name in a file without adapters, which wrap the layers they change."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def start_adapters(model: nn.Module, how: Lora) -> None:
    """A as nn.Linear starts (uniform, bound 1 / sqrt(in)), B zero: the adapters change nothing yet."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            digest = hashlib.blake2b(f"{how.seed}/{name}".encode(), digest_size=7).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest))
            bound = 1 / math.sqrt(parameter.shape[1])
            values = torch.empty(parameter.shape, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
            parallel.assign(parameter, values)
        elif ".lora_B." in name:
            parallel.local(parameter).zero_()
