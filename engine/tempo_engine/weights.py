"""Models from configs and directories: with weights, or first without memory (on the meta device) and then filled by shards."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tempo_engine import checkpoint, parallel
from tempo_engine.adapters import Lora, file_name, is_adapter
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
        missing = sorted(report["missing_keys"])
        raise UserError(f"{path} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} for one")
    return model


def load_causal_lm(path: Path, *, dtype: torch.dtype, attention: Attention) -> PreTrainedModel:
    """A causal language model from a Hugging Face directory (config.json and safetensors; never pickles, never remote code).

    Raises UserError when the directory, its config or its weights are missing or unusable.
    """
    require_model_directory(path)
    with _usable(path):
        return load_whole(AutoModelForCausalLM, path, dtype=dtype, attn_implementation=attention)


def blank_causal_lm(path: Path, *, dtype: torch.dtype, attention: Attention) -> PreTrainedModel:
    """The same model without memory for its weights. `fill_from` gives it those once it is sharded."""
    require_model_directory(path)
    with _usable(path), without_memory():
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


@contextmanager
def without_memory() -> Iterator[None]:
    """Parameters of modules made inside are on the meta device; buffers, which often are in no file, get their values as ever."""
    register = nn.Module.register_parameter

    def register_blank(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is there already is being tied
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_blank
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def blank_like(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the same class and config without memory for its weights."""
    with without_memory():
        return type(model)._from_config(copy.deepcopy(model.config), dtype=dtype).eval()


def is_blank(model: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in model.parameters())


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the LM head is the input embedding."""
    head = model.get_output_embeddings()
    return head is not None and cast(Any, head).weight is cast(Any, model.get_input_embeddings()).weight


def make_room(model: PreTrainedModel, device: torch.device, how: Sharding) -> None:
    """Give a blank model, sharded or not, memory for its weights."""
    was_tied = is_tied(model)
    home = "cpu" if how.offload and how.is_needed else device
    model._apply(lambda x: torch.empty_like(x, device=home) if x.is_meta else x.to(device))
    if was_tied and not is_tied(model):
        model.tie_weights()


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that belong into a file."""
    buffers = {name: x for name, x in model.state_dict(keep_vars=True).items() if not isinstance(x, nn.Parameter)}
    return {**dict(model.named_parameters()), **buffers}


def fill_from(model: PreTrainedModel, path: Path) -> None:
    """Weights from the safetensors files of a Hugging Face directory; each rank reads the slices of its own shards.

    Where files name or cut weights otherwise than the model in memory (mixtures of experts), transformers converts them: each
    rank then holds the whole model in host memory for a while. Raises UserError when the directory lacks weights of the model.
    """
    wanted = {file_name(name): x.detach() for name, x in named_weights(model).items() if not is_adapter(name)}
    with _usable(path):
        if wanted.keys() <= checkpoint.names(path).keys():
            checkpoint.load_tensors(path, wanted)
            return
        whole = named_weights(load_whole(AutoModelForCausalLM, path, dtype=model.dtype))
        for name, x in wanted.items():
            parallel.assign(x, whole[name].detach())


def save_config(model: PreTrainedModel, folder: Path) -> None:
    """config.json, which also names the class of the model."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Weights of a model into another one of the same architecture that is sharded in the same way."""
    theirs = named_weights(source)
    for name, x in named_weights(target).items():
        parallel.local(x).copy_(parallel.local(theirs[name]))


@torch.no_grad()
def whole_weights(model: PreTrainedModel, dtype: torch.dtype, lora: Lora | None) -> Iterator[tuple[str, Tensor]]:
    """All weights, whole, one after the other, by their names in a file; adapters added to what they adapt (W + alpha / rank B A).

    Collective: every rank must walk through all of them.
    """
    named = named_weights(model)
    for name, parameter in named.items():
        if is_adapter(name):
            continue
        weight = parallel.whole(parameter)
        stem = name.removesuffix("base_layer.weight")
        if lora and stem != name:
            a, b = (parallel.whole(named[f"{stem}lora_{x}.default.weight"]) for x in "AB")
            weight = weight + lora.alpha / lora.rank * (b @ a)
        yield file_name(name), weight.detach().to(dtype)
