"""A platform for SGLang on machines without an accelerator: plain PyTorch, no kernels of its own.

SGLang finds both functions by entry points (`sglang.srt.platforms` and `sglang.srt.plugins`, see pyproject.toml). Where there is an
accelerator they do nothing. What they change is internal to one release, so every other one is refused.
"""

import enum
import importlib.machinery
import importlib.util
import multiprocessing
import sys
import types
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from tempo_engine.sglang import VERSION

# Where SGLang keeps what is replaced.
MURMUR_HASH = "sglang.kernels.ops.sampling.murmur_hash.murmur_hash32"
BATCH_INVARIANT_MODE = "sglang.srt.batch_invariant_ops.enable_batch_invariant_mode"
SET_UP = "sglang.srt.entrypoints.engine._set_envs_and_config"
UINT32 = 0xFFFFFFFF


def activate() -> str | None:
    """The platform's class, or None where an accelerator runs SGLang. Raises RuntimeError for another release of sglang."""
    if torch.accelerator.is_available():
        return None
    _check_version()
    _stand_in_for_torchvision()
    from sglang.srt.arg_groups import choices  # pyright: ignore[reportMissingImports]

    # Seeds of single requests count in deterministic mode only, which knows the attention backends it may run with.
    if "torch_native" not in choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES:
        choices.add_deterministic_attention_backend_choices(["torch_native"])
        choices.add_radix_supported_deterministic_attention_backend_choices(["torch_native"])
    return f"{__name__}.CpuPlatform"


def register_hooks() -> None:
    """Deterministic mode without Triton: products on a CPU do not depend on the batch, and the seeds' hash is plain PyTorch."""
    if torch.accelerator.is_available():
        return
    _check_version()
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType  # pyright: ignore[reportMissingImports]

    HookRegistry.register(MURMUR_HASH, murmur_hash32, HookType.REPLACE)
    HookRegistry.register(BATCH_INVARIANT_MODE, _nothing_to_enable, HookType.REPLACE)
    HookRegistry.register(SET_UP, _then_fork, HookType.AROUND)


def _check_version() -> None:
    if (found := version("sglang")) != VERSION:
        raise RuntimeError(f"this CPU platform is made for sglang {VERSION}, found {found}; run `make sglang-cpu`")


def __getattr__(name: str) -> Any:
    """The class is made when it is asked for: SGLang's platforms are still being imported when `activate` runs."""
    if name != "CpuPlatform":
        raise AttributeError(name)
    from sglang.srt.platforms.cpu import CpuDeviceMixin  # pyright: ignore[reportMissingImports]
    from sglang.srt.platforms.device_mixin import PlatformEnum  # pyright: ignore[reportMissingImports]
    from sglang.srt.platforms.interface import (  # pyright: ignore[reportMissingImports]
        PlatformCapabilities,
        SRTPlatform,
    )

    class CpuPlatform(CpuDeviceMixin, SRTPlatform):  # pyright: ignore[reportIncompatibleMethodOverride]
        # Out of tree: SGLang's own CPU platform wants kernels of which there is no package.
        _enum = PlatformEnum.OOT
        device_name = "cpu"
        device_type = "cpu"
        capabilities = PlatformCapabilities()

        def get_default_attention_backend(self) -> str:
            return "torch_native"

        def get_dispatch_key_name(self) -> str:
            return "native"

        def get_compile_backend(self, mode: str | None = None) -> str:
            return "eager"

    globals()[name] = CpuPlatform
    return CpuPlatform


def _then_fork(set_up: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang's processes begin as copies of the first one, which has imported everything: half the time to start. Its reason to
    begin afresh is CUDA."""
    set_up(*args, **kwargs)
    multiprocessing.set_start_method("fork", force=True)


def _nothing_to_enable(*args: Any, **kwargs: Any) -> None:
    """Replaces the switch to batch-invariant Triton kernels."""


def _stand_in_for_torchvision() -> None:
    """Modules with the names that SGLang imports for images: there is no CPU build of torchvision beside that of torch."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    from transformers.utils.import_utils import is_torchvision_available

    is_torchvision_available()  # transformers concludes that there is none, before there seems to be one
    interpolation = enum.Enum(
        "InterpolationMode",
        {name.upper(): name for name in ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")},
    )
    for name in ("", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional", ".io"):
        module: Any = types.ModuleType(f"torchvision{name}")
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        module.__version__ = "0.0.0"
        module.InterpolationMode = interpolation
        sys.modules[module.__name__] = module
        parent, _, leaf = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)


def murmur_hash32(seed: Tensor, positions: Tensor, col_indices: Tensor) -> Tensor:
    """MurmurHash3-32 (Appleby 2011) of four words: seed's low and high half, position, column; [N], [N], [M] -> uint32 [N, M]."""
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    words_N1 = (seed & UINT32, (seed >> 32) & UINT32, positions.to(torch.int64) & UINT32)
    h = torch.zeros(len(seed), 1, dtype=torch.int64)
    for word_N in words_N1:
        h = _mix(h, word_N[:, None])
    h = _mix(h, col_indices.to(torch.int64)[None]) ^ 16  # bytes
    h = (h ^ (h >> 16)) * 0x85EBCA6B & UINT32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 & UINT32
    return (h ^ (h >> 16)).to(torch.uint32)


def _mix(h: Tensor, word: Tensor) -> Tensor:
    word = word * 0xCC9E2D51 & UINT32
    word = (word << 15 | word >> 17) * 0x1B873593 & UINT32
    h = h ^ word
    return (h << 13 | h >> 19) * 5 + 0xE6546B64 & UINT32
