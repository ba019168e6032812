"""Save, verify, resume, export. Safetensors and JSON only: nothing here can execute code when it is read.

A checkpoint is a folder `step-00000012` with tensors.safetensors, state.json and manifest.json (sizes and SHA-256). It is written
under a temporary name, flushed to disk, then renamed: a folder with that name is complete. The one before is deleted only after
the new one verifies.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, PreTrainedModel

from tempo_engine.errors import UserError, first_sentence
from tempo_engine.model import Critic, Policy, load_whole, trunk_of

PREFIX = "step-"


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover)
    temporary = folder / f".writing-{os.getpid()}"
    temporary.mkdir()
    # A copy in host memory: safetensors refuses tensors that share memory, and a GPU has no room for a second set.
    copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    save_file(copies, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    manifest = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*temporary.iterdir(), temporary]:
        _flush(path)
    final = folder / f"{PREFIX}{step:08d}"
    if final.exists():  # out of the way in one step, so that a kill never leaves half a checkpoint under a good name
        final.rename(folder / f".writing-old-{os.getpid()}")
    temporary.rename(final)
    _flush(folder)
    problem = damage(final)
    if problem:
        raise OSError(f"the checkpoint just written to {final} does not verify: {problem}; older ones were kept")
    # Folders of later steps are damaged ones that a resume skipped: they do not count, and this run writes them anew.
    older = [path for path in list_checkpoints(folder) if path.name < final.name]
    for old in [*older[: len(older) - keep + 1], *folder.glob(".writing-old-*")]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file has the size and hash of its manifest."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            if _fingerprint(checkpoint / name) != expected:
                return f"{name} is not what its manifest says"
    except (OSError, ValueError, AttributeError) as error:
        return str(error)
    return None


def load_newest(folder: Path, warn: Any = print) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Tensors and state of the newest undamaged checkpoint; damaged ones are skipped aloud.

    Raises UserError when there is none.
    """
    for checkpoint in reversed(list_checkpoints(folder)):
        problem = damage(checkpoint)
        if problem is None:
            state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
            return load_file(checkpoint / "tensors.safetensors"), state, checkpoint
        warn(f"skipping the damaged checkpoint {checkpoint}: {problem}")
    raise UserError(f"{folder} holds no usable checkpoint; start again in another --run-dir")


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def export_policy(policy: Policy, tokenizer: Any, folder: Path) -> None:
    """The policy as a Hugging Face directory: weights, config, generation config, tokenizer."""
    with _in_one_piece(folder) as temporary:
        policy.model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


@contextmanager
def _in_one_piece(folder: Path) -> Iterator[Path]:
    """A folder to write into that becomes `folder` only when everything in it is written."""
    temporary = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def export_critic(critic: Critic, tokenizer: Any, folder: Path) -> None:
    """The critic as a Hugging Face directory.

    A token-classification model with one label where transformers has that class for the architecture; else the trunk, with the
    head in `value_head.safetensors` (`weight` [hidden], `bias` []). `load_critic` reads both.
    """
    with _in_one_piece(folder) as temporary:
        _write_critic(critic, temporary)
        tokenizer.save_pretrained(temporary)


def _write_critic(critic: Critic, folder: Path) -> None:
    config = AutoConfig.for_model(**{**critic.config.to_dict(), "num_labels": 1})
    try:
        model = AutoModelForTokenClassification.from_config(config)
        score = _score_layer(model)
    except ValueError:  # transformers has no such class for this architecture, or one of another make
        trunk: Any = critic.trunk
        trunk.save_pretrained(folder)
        save_file({"weight": critic.weight.detach(), "bias": critic.bias.detach()}, folder / "value_head.safetensors")
    else:
        nn.Module.to(model, next(critic.trunk.parameters()))
        trunk_of(model).load_state_dict(critic.trunk.state_dict())
        with torch.no_grad():
            score.weight.copy_(critic.weight[None])
            score.bias.copy_(critic.bias[None])
        # The head keeps its own precision: see Critic.
        score.to(critic.weight.dtype)
        model.save_pretrained(folder)


def load_critic(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """Trunk, head weight [hidden] and bias [] of an exported critic: V_t = trunk(ids).last_hidden_state[t] . weight + bias.

    Raises UserError when weights are missing: a policy's directory has no value head.
    """
    head = folder / "value_head.safetensors"
    if head.is_file():
        tensors = load_file(head)
        return load_whole(AutoModel, folder), tensors["weight"], tensors["bias"]
    model = load_whole(AutoModelForTokenClassification, folder, dtype=torch.float32)
    score = _score_layer(model)
    return trunk_of(model), score.weight.detach()[0], score.bias.detach()[0]


def restore_critic(critic: Critic, folder: Path) -> None:
    """Load an exported critic into one of the same architecture.

    Raises UserError when the folder is not an exported critic or does not fit.
    """
    try:
        trunk, weight, bias = load_critic(folder)
        critic.trunk.load_state_dict(trunk.state_dict())
        with torch.no_grad():
            critic.weight.copy_(weight)
            critic.bias.copy_(bias)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} does not hold a critic that fits this policy: {first_sentence(error)}") from error


def _score_layer(model: PreTrainedModel) -> nn.Linear:
    """The layer that turns hidden states into labels. Raises ValueError when there is no linear one."""
    layer = getattr(model, "score", getattr(model, "classifier", None))
    if not isinstance(layer, nn.Linear):
        raise ValueError(f"{type(model).__name__} has no linear score layer")
    return layer
