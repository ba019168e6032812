"""Who runs an op, the Triton kernels or PyTorch, and the one place where a kernel is launched.

`TEMPO_KERNELS` chooses: `auto` (the default: Triton for tensors on a GPU, PyTorch elsewhere), `torch`, or `triton`, which on a
CPU needs Triton's interpreter (`TRITON_INTERPRET=1`, set before this package is imported). float64 always runs in PyTorch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton
    import triton.language as tl
    from triton import jit, knobs
else:
    try:
        import triton
        import triton.language as tl
        from triton import jit, knobs
    except ImportError:  # there is no Triton for macOS and Windows: the kernels stay unused definitions
        triton = tl = knobs = None

        def jit(*functions, **_options):
            return functions[0] if functions else lambda function: function


IS_INTERPRETED = triton is not None and bool(knobs.runtime.interpret)


class Target(NamedTuple):
    """What a kernel runs on: ("cuda", 90), ("hip", "gfx942") or ("cpu", "interpreter")."""

    backend: str
    arch: int | str


INTERPRETER = Target("cpu", "interpreter")


class Launch(NamedTuple):
    """One launch as the op asked for it: arguments by the kernel's own parameter names."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass
class _Recording:
    target: Target
    launches: list[Launch] = field(default_factory=list)


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)


@contextmanager
def recorded(target: Target) -> Iterator[list[Launch]]:
    """Inside, ops behave as if their tensors were on `target`, and launches are written down instead of run."""
    recording = _Recording(target)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def use_triton(x: Tensor) -> bool:
    """Whether Triton kernels run an op on x; see the top of this file.

    Raises ValueError when `TEMPO_KERNELS` asks for what this machine cannot do.
    """
    if _recording.get() is not None:
        return x.dtype != torch.float64
    choice = os.environ.get("TEMPO_KERNELS", "auto")
    if choice not in ("auto", "triton", "torch"):
        raise ValueError(f"TEMPO_KERNELS must be auto, triton or torch, got {choice!r}")
    if choice == "torch" or x.dtype == torch.float64:
        return False
    if choice == "auto":
        return x.is_cuda and triton is not None
    if triton is None:
        raise ValueError("TEMPO_KERNELS=triton, but triton is not installed: install it, or set TEMPO_KERNELS=torch")
    if not x.is_cuda and not IS_INTERPRETED:
        raise ValueError(
            f"TEMPO_KERNELS=triton with a tensor on {x.device}: set TRITON_INTERPRET=1 to run the kernels on a CPU"
        )
    return True


def target_of(x: Tensor) -> Target:
    """What the kernels run on for tensors where x is."""
    recording = _recording.get()
    if recording is not None:
        return recording.target
    if not x.is_cuda:
        return INTERPRETER
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(x.device)
    return Target("cuda", 10 * major + minor)


def launch(
    kernel: Any, num_programs: int, *arguments: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `num_programs` programs of a kernel on its positional `arguments`, the first of which is a tensor.

    Grids are one-dimensional: the other dimensions end at 65535. `constants` are the kernel's constexpr parameters.
    """
    recording = _recording.get()
    if recording is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        recording.launches.append(Launch(kernel, named, constants, num_warps, num_stages))
    elif num_programs > 0:
        with torch.cuda.device_of(arguments[0]):
            # fusion of multiply and add is spelled out: Triton 3.10 changes its default, and with it the bits
            kernel[(num_programs,)](
                *arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constants
            )
