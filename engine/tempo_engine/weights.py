"""Models from configs and directories: with weights, or first without memory (on the meta device) and then filled by shards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tempo_engine import checkpoint, parallel
from tempo_engine.adapters import file_name, is_adapter
from tempo_engine.errors import UserError, first_sentence
from tempo_engine.parallel import Sharding

Attention = Literal["eager", "sdpa", "flash_attention_2"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def require_model_directory(path: Path) -> None:
    """Raises UserError when the directory lacks its config or its safetensors weights."""
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a Hugging Face model directory: {path}/config.json does not exist")
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} has no *.safetensors weights; save the model with save_pretrained() into that directory"
        )


def load_whole(auto_class: Any, path: Path, **options: Any) -> PreTrainedModel:
    """`auto_class.from_pretrained` of a local safetensors directory that has every weight of the model.

    Raises UserError when weights are missing: transformers would fill them with random numbers.
    """
    model, report = auto_class.from_pretrained(
        path, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
    )
    if report["missing_keys"]:
        raise _lacks(path, set(report["missing_keys"]), type(model).__name__)
    return model


def _lacks(path: Path, missing: set[str], model: str) -> UserError:
    return UserError(f"{path} lacks {len(missing)} weights of a {model}, {min(missing)} for one")


def load_causal_lm(path: Path, *, dtype: torch.dtype, attention: Attention) -> PreTrainedModel:
    """A causal language model from a Hugging Face directory (config.json and safetensors; never pickles, never remote code).

    Raises UserError when the directory, its config or its weights are missing or unusable.
    """
    require_model_directory(path)
    with _usable(path):
        return load_whole(AutoModelForCausalLM, path, dtype=dtype, attn_implementation=attention)


def blank_causal_lm(path: Path, *, dtype: torch.dtype, attention: Attention) -> PreTrainedModel:
    """The same model on the meta device: shapes without memory. `fill_from` gives it its weights once it is sharded."""
    require_model_directory(path)
    with _usable(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """transformers, safetensors and flash-attn raise many kinds of exception for a directory that they cannot use."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"transformers cannot load {path}: {first_sentence(error)}") from error


def create_causal_lm(config: dict[str, Any], *, dtype: torch.dtype, attention: Attention, seed: int) -> PreTrainedModel:
    """A freshly initialised causal language model: `config` holds `model_type` and whatever its transformers config takes.

    Raises UserError when transformers does not know the model type or refuses the config.
    """
    fields = dict(config)
    try:
        model_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(model_config, dtype=dtype, attn_implementation=attention)
    except Exception as error:  # each architecture's config checks itself in its own way
        raise UserError(f"transformers cannot create model.create {config}: {first_sentence(error)}") from error


# --- Models without memory ---------------------------------------------------------------------------------------------------


def blank_like(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same class and config on the meta device."""
    with torch.device("meta"):
        return type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)


def is_blank(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the LM head is the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and cast(Any, head).weight is cast(Any, model.get_input_embeddings()).weight


def make_room(model: PreTrainedModel, device: torch.device, how: Sharding) -> None:
    """Give a blank model, sharded or not, memory for its weights, and its buffers their values."""
    was_tied = is_tied(model)
    model.to_empty(device="cpu" if how.offload and how.is_needed else device)
    if was_tied and not is_tied(model):
        model.tie_weights()
    for module in model.modules():
        if any(True for _ in module.buffers(recurse=False)):  # rotary frequencies: in no file, computed from the config
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
            model._init_weights(module)


def fill_from(model: PreTrainedModel, path: Path) -> None:
    """Weights from the safetensors files of a Hugging Face directory; each rank reads the slices of its own shards.

    Raises UserError when the directory lacks weights of the model.
    """
    wanted = {file_name(name): p.detach() for name, p in model.named_parameters() if not is_adapter(name)}
    with _usable(path):
        missing = wanted.keys() - checkpoint.load_tensors(path, wanted)
    if missing:
        raise _lacks(path, set(missing), type(model).__name__)


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Parameters of a model into another one of the same architecture that is sharded in the same way."""
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parallel.local(parameter).copy_(parallel.local(theirs[name]))
