"""Models that are one GGUF file, as llama.cpp wants them: read by transformers, dequantised, kept as Hugging Face directories."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tempo_engine.errors import UserError, first_sentence
from tempo_engine.export import in_one_piece
from tempo_engine.weights import Attention, load_whole


def find_gguf(where: str) -> Path:
    """The file at a path, or the only one that an installed Python package of that name brings; nothing of it is imported.

    Raises UserError when there is none, or several.
    """
    path = Path(where).expanduser()
    if path.suffix == ".gguf" or path.exists():
        if not path.is_file():
            raise UserError(f"{where} is no file; name a .gguf file, or an installed package that brings one")
        return path
    package = importlib.util.find_spec(where) if where.isidentifier() else None
    if package is None:
        raise UserError(f"{where} is neither a .gguf file nor an installed package that brings one")
    folders = package.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        found = ", ".join(map(str, files)) or "none"
        raise UserError(f"the package {where} must bring one .gguf file, found {found}; name the file itself")
    return files[0]


def load_gguf(file: Path, *, dtype: torch.dtype, attention: Attention) -> tuple[PreTrainedModel, Any]:
    """A causal language model and its tokenizer from a GGUF file. Quantised weights become what their blocks stand for, in `dtype`.

    Raises UserError when a package that reads such files is missing, or transformers cannot make a model of this one.
    """
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"reading GGUF files needs {' and '.join(missing)}; pip install 'tempo-engine[gguf]'")
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    # Releases that know this config can leave weights in their blocks; those before it never did.
    if how := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = how(dequantize=True)
    try:
        model = load_whole(AutoModelForCausalLM, file.absolute().parent, gguf_file=file.name, **options)
        tokenizer = AutoTokenizer.from_pretrained(file.absolute().parent, gguf_file=file.name, local_files_only=True)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # of many kinds: a broken file, an architecture or a tokenizer that transformers cannot convert
        raise UserError(f"transformers cannot read {file}: {first_sentence(error)}") from error
    return model, tokenizer


def import_gguf(file: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as a Hugging Face directory with safetensors, in float32: nothing is rounded.

    Raises UserError when `target` exists.
    """
    if target.exists():
        raise UserError(f"{target} exists already; move it away first, or name another folder")
    model, tokenizer = load_gguf(file, dtype=torch.float32, attention="eager")
    with in_one_piece(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
