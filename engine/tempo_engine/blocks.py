"""What is done to the transformer blocks of a model, whatever its architecture: adapters, activation checkpointing, compilation."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from tempo_engine.adapters import Lora, add_adapters

ActivationCheckpointing = Literal["off", "selective", "full"]

# What `selective` keeps, by name: results that cost far more to compute than to store.
_KEPT = ("aten::mm", "aten::addmm", "aten::bmm", "aten::_grouped_mm", "aten::_scaled_dot_product_", "flash_attn::")


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """`activation_checkpointing`: what the backward computes again: nothing, all but matrix products and attention, or whole
    blocks. `compile`: torch.compile each block. `lora`: train adapters instead of the weights."""

    activation_checkpointing: ActivationCheckpointing = "off"
    compile: bool = False
    lora: Lora | None = None


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks: the modules that their architecture says must stay in one piece."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def tune_blocks(model: PreTrainedModel, how: BlockOptions) -> None:
    """Apply the options, in place. Names of modules and parameters stay as they are, but for layers that adapters wrap."""
    if how.lora is not None:
        add_adapters(model, how.lora)
    if model.dtype == torch.float64:
        for module in [*blocks_of(model), *cast(PreTrainedModel, model.base_model).children()]:
            module.forward = _in_float64(module.forward)
    for block in blocks_of(model):
        if how.compile:
            block.forward = _compiled(block.forward)
        if how.activation_checkpointing != "off":
            block.forward = _recomputed(block.forward, how.activation_checkpointing)


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled for training only: with a cache, whose place differs from block to block, each block would be another graph."""
    fast = torch.compile(forward, dynamic=True)

    def chosen(*args: Any, **kwargs: Any) -> Any:
        return (forward if kwargs.get("past_key_values") is not None else fast)(*args, **kwargs)

    return chosen


def _recomputed(forward: Callable[..., Any], mode: ActivationCheckpointing) -> Callable[..., Any]:
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing in a block is random
    if mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)

    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def is_kept(name: str) -> bool:
    """Whether `selective` checkpointing keeps the result of an operation: `aten::mm`, `flash_attn::_flash_attn_varlen_forward`."""
    return name.split(".")[0].startswith(_KEPT)


def _keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_kept(op.name()) else CheckpointPolicy.PREFER_RECOMPUTE


class _Float64(TorchFunctionMode):
    """float32 means float64. transformers computes norms and softmax in float32 whatever the model is: more than bfloat16 has,
    but of a float64 model it would leave seven digits, and a result that depends on the order of additions."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if value is torch.float32 else value for value in args)
        return func(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()})


def _in_float64(forward: Callable[..., Any]) -> Callable[..., Any]:
    def wide(*args: Any, **kwargs: Any) -> Any:
        with _Float64():
            return forward(*args, **kwargs)

    return wide
