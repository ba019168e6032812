"""Policy and critic as Hugging Face directories: from a live run on any number of ranks, or from one of its checkpoints."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from tempo_engine import checkpoint, parallel
from tempo_engine.adapters import Lora, add_adapters, file_name, is_adapter
from tempo_engine.errors import UserError, first_sentence
from tempo_engine.model import Critic, Policy, ValueHead, trunk_of
from tempo_engine.parallel import Sharding
from tempo_engine.tokenizer import load_tokenizer
from tempo_engine.weights import (
    blank_like,
    create_causal_lm,
    fill_from,
    make_room,
    named_weights,
    whole_weights,
    without_memory,
)

MAX_SHARD_SIZE = "5GB"  # of a file
# The layer that turns hidden states into labels, in the token-classification models of transformers.
HEADS = ("score", "classifier")


def export_policy(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """The policy with config, generation config and tokenizer, in the dtype it computes in, adapters merged. Collective.

    Weights are gathered one after the other; the main rank keeps them in host memory and writes.
    """
    _export_policy(policy.model, tokenizer, folder, policy.sharding.compute, policy.blocks.lora)


def export_critic(critic: Critic, tokenizer: Any, folder: Path) -> None:
    """The critic, likewise: V_t = trunk(ids).last_hidden_state[t] . weight + bias. Collective.

    A token-classification model with one label where transformers has that class for the architecture; else the trunk, with the
    head in `value_head.safetensors` (`weight` [hidden], `bias` []). The head keeps its own precision: see Critic.
    """
    how = critic.policy
    _export_critic(critic.trunk, critic.head, tokenizer, folder, how.sharding.compute, how.blocks.lora)


def save_skeleton(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """What an export has beside weights: config, generation config, tokenizer. For one rank."""
    with in_one_piece(folder) as temporary:
        policy.model.config.save_pretrained(temporary)
        policy.model.generation_config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def restore_critic(critic: Critic, folder: Path) -> None:
    """Load an exported critic into one of the same architecture; of a critic on the policy's trunk the head only. Collective.

    Raises UserError when the folder is not an exported critic or does not fit.
    """
    _read_critic(folder, critic.trunk if critic.backbone == "separate" else None, critic.head)


# --- From a checkpoint -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """Where the weights are that adapters leave as they are: checkpoints hold only what is trained.

    `policy`: a Hugging Face directory; None: created from the config with this `seed`. `critic`: the exported critic that the
    critic's trunk began as; None: it began as the policy's.
    """

    lora: Lora
    policy: Path | None
    critic: Path | None
    seed: int


def export_checkpoint(
    saved: Path, skeleton: Path, target: Path, *, dtype: torch.dtype, frozen: Frozen | None = None
) -> list[Path]:
    """Export what a checkpoint of any number of ranks holds as `target`/policy and, if there is one, `target`/critic.

    For one process; its memory holds one of the two models at a time. Returns their folders. Raises UserError when the checkpoint
    does not fit the skeleton.
    """
    tokenizer, lora = load_tokenizer(skeleton), frozen.lora if frozen else None
    names = checkpoint.names(saved)
    model = _frozen_model(skeleton, dtype, frozen)
    _read_trained(saved, "policy/", model)
    _export_policy(model, tokenizer, target / "policy", dtype, lora)
    if "critic/head.weight" not in names:
        return [target / "policy"]
    has_own_trunk = any(name.startswith("critic/trunk.") for name in names)
    if has_own_trunk:
        del model
        model = _frozen_model(skeleton, dtype, frozen)
    trunk = trunk_of(model)
    heads = names["critic/head.bias"].numel()
    size = names["critic/head.weight"].numel() // heads
    head = ValueHead(size, torch.promote_types(dtype, torch.float32), torch.device("cpu"), heads)
    if frozen and frozen.critic:
        _read_critic(frozen.critic, trunk, head)
    if has_own_trunk:
        _read_trained(saved, "critic/trunk.", trunk)
    _read_trained(saved, "critic/head.", head)
    _export_critic(trunk, head, tokenizer, target / "critic", dtype, lora)
    return [target / "policy", target / "critic"]


def _frozen_model(skeleton: Path, dtype: torch.dtype, frozen: Frozen | None) -> PreTrainedModel:
    """A model in host memory whose trained weights are still to be read."""
    config = AutoConfig.from_pretrained(skeleton, local_files_only=True)
    if frozen:
        dtype = torch.promote_types(dtype, torch.float32)
    with without_memory():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config = GenerationConfig.from_pretrained(skeleton, local_files_only=True)
    if frozen:
        add_adapters(model, frozen.lora)
    make_room(model, torch.device("cpu"), Sharding())
    if frozen and frozen.policy:
        fill_from(model, frozen.policy)
    elif frozen:
        created = create_causal_lm(config.to_dict(), dtype=dtype, attention="eager", seed=frozen.seed)
        weights = dict(created.named_parameters())
        for name, parameter in model.named_parameters():
            if not is_adapter(name):
                parameter.data.copy_(weights[file_name(name)])
    return model


def _read_trained(saved: Path, prefix: str, model: nn.Module) -> None:
    """Parameters that are trained, and buffers."""
    trained = {
        name: x for name, x in named_weights(model).items() if x.requires_grad or not isinstance(x, nn.Parameter)
    }
    wanted = {f"{prefix}{name}": x.detach() for name, x in trained.items()}
    missing = wanted.keys() - checkpoint.load_tensors(saved, wanted)
    if missing:
        raise UserError(f"{saved} lacks {len(missing)} weights of the run's model, {min(missing)} for one")


def _read_critic(folder: Path, trunk: PreTrainedModel | None, head: ValueHead) -> None:
    """Fill trunk, if one is given, and head from an exported critic."""
    try:
        names = checkpoint.names(folder)
        layer = next((f"{head}." for head in HEADS if f"{head}.weight" in names), "")
        if f"{layer}weight" not in names:
            raise UserError(f"{folder} lacks a value head, so it is not an exported critic")
        ours: dict[str, Tensor] = {}
        if trunk is not None:
            prefix = f"{trunk.base_model_prefix}." if layer else ""
            ours = {prefix + file_name(n): x for n, x in named_weights(trunk).items() if not is_adapter(n)}
        own_head = {f"{layer}{n}": torch.empty(names[f"{layer}{n}"], dtype=p.dtype) for n, p in head.named_parameters()}
        odd = (ours | own_head).keys() ^ names.keys()
        if trunk is not None and odd:
            raise UserError(
                f"{folder} does not hold a critic that fits this policy: it {'has' if min(odd) in names else 'lacks'} {min(odd)}"
            )
        checkpoint.load_tensors(folder, ours | own_head)
        for name, parameter in head.named_parameters():
            parallel.assign(parameter.detach(), own_head[f"{layer}{name}"].reshape(parameter.shape))
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold a critic that fits this policy: {first_sentence(error)}") from error


# --- Writing -----------------------------------------------------------------------------------------------------------------


def _export_policy(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype, lora: Lora | None) -> None:
    weights = _whole_weights(model, dtype, lora)
    if parallel.is_main():
        blank = blank_like(model, dtype)
        blank.generation_config = model.generation_config
        with in_one_piece(folder) as temporary:
            _save(blank, weights, temporary, as_published=True)
            tokenizer.save_pretrained(temporary)
    parallel.wait_for_all()


def _export_critic(
    trunk: PreTrainedModel, head: ValueHead, tokenizer: Any, folder: Path, dtype: torch.dtype, lora: Lora | None
) -> None:
    weights = _whole_weights(trunk, dtype, lora)
    weight, bias = (parallel.whole(p.detach()).cpu() for p in (head.weight, head.bias))
    if len(bias) > 1:  # linear ones: their mean is a head
        weight, bias = weight.view(len(bias), -1).mean(0), bias.mean(0, keepdim=True)
    if parallel.is_main():
        with in_one_piece(folder) as temporary:
            try:
                model, layer = _classifier(trunk, dtype)
            except ValueError:  # transformers has no such class for this architecture, or one of another make
                _save(blank_like(trunk, dtype), weights, temporary, as_published=False)
                save_file({"weight": weight, "bias": bias[0]}, temporary / "value_head.safetensors")
            else:
                whole = {f"{model.base_model_prefix}.{name}": tensor for name, tensor in weights.items()}
                whole |= {f"{layer}.weight": weight[None], f"{layer}.bias": bias}
                _save(model, whole, temporary, as_published=False)
            tokenizer.save_pretrained(temporary)
    parallel.wait_for_all()


def _classifier(trunk: PreTrainedModel, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """A token-classification model with one label, without memory, and the name of the layer that turns hidden states into labels.

    Raises ValueError when transformers has none with such a layer.
    """
    config = copy.deepcopy(trunk.config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(config, dtype=dtype)
    for layer in HEADS:
        if isinstance(getattr(model, layer, None), nn.Linear):
            return model, layer
    raise ValueError(f"{type(model).__name__} has no linear score layer")


def _whole_weights(model: PreTrainedModel, dtype: torch.dtype, lora: Lora | None) -> dict[str, Tensor]:
    """All weights by their names in a file, in host memory: on the main rank, else {}."""
    return {name: x.cpu() for name, x in whole_weights(model, dtype, lora) if parallel.is_main()}


def _save(model: PreTrainedModel, weights: dict[str, Tensor], folder: Path, *, as_published: bool) -> None:
    """Write `weights` as those of `model`, which has none of its own.

    `as_published`: named and cut as in the architecture's own releases, which every library reads, not as transformers computes
    with them (the experts of a mixture in one tensor), which can be read back shard by shard.
    """
    logging.disable_progress_bar()
    model.save_pretrained(folder, state_dict=weights, max_shard_size=MAX_SHARD_SIZE, save_original_format=as_published)


@contextmanager
def in_one_piece(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` only when everything in it is written."""
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
