"""Every kernel, compiled ahead of time for GPUs that are not present, with what the compiler made of it.

The kernels are compiled exactly as the ops launch them: an op runs on small tensors while its launches are written down instead
of executed (`dispatch.recorded`), and each distinct launch is compiled for the target. A report row fails when a register spills,
when shared memory exceeds what the target has, when a half-precision product is not done by matrix instructions, or when
float64 arithmetic crept in.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from tempo_kernels.advantage import advantage, whiten, whitened_advantage
from tempo_kernels.dispatch import IS_INTERPRETED, Launch, Target, knobs, recorded, triton
from tempo_kernels.linear_logprob import linear_logprob
from tempo_kernels.logprob import gather_logprob
from tempo_kernels.policy_loss import PolicyLossKind, policy_loss
from tempo_kernels.value_head import HeadKind, ValueClip, ValueLossKind, value_head, value_head_loss


class Device(NamedTuple):
    """A GPU to compile for: its target, the threads of a warp and the shared memory that one program can have, in bytes."""

    target: Target
    warp_size: int
    max_shared: int
    matrix_instruction: str


DEVICES = {
    "sm_80": Device(Target("cuda", 80), 32, 163 * 1024, r"\bHMMA"),
    "sm_90": Device(Target("cuda", 90), 32, 227 * 1024, r"\bHGMMA"),
    "sm_100": Device(Target("cuda", 100), 32, 227 * 1024, r"\bUTC\w*MMA"),
    "gfx942": Device(Target("hip", "gfx942"), 64, 64 * 1024, r"\bv_mfma"),
}


class Source(NamedTuple):
    """One launch in a form that another process can compile: the kernel by name, its arguments by type."""

    op: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int


class Compiled(NamedTuple):
    """A row of the report: registers per thread, bytes of them spilled, bytes of shared memory, matrix instructions."""

    op: str
    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    mma: int
    problems: tuple[str, ...]


def compile_kernels(
    targets: list[str], *, num_processes: int = 0, on_row: Callable[[Compiled], None] = lambda _: None
) -> list[Compiled]:
    """Compile every kernel for each target; `on_row` hears of each row as soon as it is there, in order.

    Raises:
        ValueError: an unknown target, no Triton, or Triton running as an interpreter, which cannot compile.
    """
    for target in targets:
        if target not in DEVICES:
            raise ValueError(f"target must be one of {', '.join(DEVICES)}, got {target!r}")
    if triton is None or IS_INTERPRETED:
        reason = "Triton is not installed" if triton is None else "TRITON_INTERPRET is set"
        raise ValueError(f"kernels cannot be compiled here: {reason}")
    work = [(source, target) for target in targets for source in sources(target)]
    num_processes = num_processes or len(os.sched_getaffinity(0))
    rows = []
    # spawn: a fork would inherit torch's threads
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_source, *zip(*work, strict=True)):
            rows.append(row)
            on_row(row)
    return rows


def sources(target: str) -> list[Source]:
    """The distinct launches of all ops on this target, in the order in which training meets them."""
    found = {}
    for op, run in _workloads():
        with recorded(DEVICES[target].target) as launches:
            run()
        for launch in launches:
            source = _source(op, launch)
            found.setdefault(str(source._replace(op="")), source)
    return list(found.values())


def _workloads() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every op, forward and backward, in each form that compiles to other code. Sizes are Qwen3-8B's where kernels depend on
    them; of tokens and vocabulary they don't."""
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        for mode, columns in (("SLAB", 512), ("STORE", 1024)):
            run = partial(_linear_logprob, dtype, max_bytes=16 * columns * dtype.itemsize)
            yield f"linear_logprob {name} {mode}", run
            yield f"linear_logprob {name} {mode}, bias, softcap", partial(run, softcap=30.0)
            yield f"linear_logprob {name} {mode}, odd vocabulary", partial(run, vocab_size=513)
    yield "gather_logprob bf16", _gather_logprob
    for head, loss, clip, has_norm in _VALUE_HEADS:
        label = f"value_head {head} {loss}, clip {clip}{', norm' if has_norm else ''}"
        yield label, partial(_value_head, head, loss, clip, has_norm)
    yield "advantage, whitened", _advantage
    yield "policy_loss gspo", partial(_policy_loss, "gspo", has_all=False)
    for kind in get_args(PolicyLossKind):
        yield f"policy_loss {kind}, importance, KL, entropy", partial(_policy_loss, kind, has_all=True)


_VALUE_HEADS: tuple[tuple[HeadKind, ValueLossKind, ValueClip, bool], ...] = (
    ("linear", "mse", "none", False),
    ("linear", "mse", "token", True),
    ("linear", "mse", "sequence_mean", True),
    ("sigmoid", "bce", "none", True),
)
_CU_SEQLENS = torch.tensor([0, 7, 16])


def _linear_logprob(
    dtype: torch.dtype, *, max_bytes: int, softcap: float | None = None, vocab_size: int | None = None
) -> None:
    hidden_TD, head_VD = _tensor(16, 4096, dtype=dtype), _tensor(1024, 4096, dtype=dtype)
    bias_V = _tensor(1024, dtype=dtype) if softcap else None
    target_T = torch.zeros(16, dtype=torch.int64)
    stats = linear_logprob(
        hidden_TD, head_VD, target_T, bias=bias_V, softcap=softcap, vocab_size=vocab_size, max_bytes=max_bytes
    )
    (stats.logprob_T + stats.entropy_T).sum().backward()


def _gather_logprob() -> None:
    stats = gather_logprob(_tensor(16, 151936, dtype=torch.bfloat16), torch.zeros(16, dtype=torch.int64))
    (stats.logprob_T + stats.entropy_T).sum().backward()


def _value_head(head: HeadKind, loss: ValueLossKind, clip: ValueClip, has_norm: bool) -> None:
    hidden_ND, weight_D = _tensor(16, 4096, dtype=torch.bfloat16), _tensor(4096)
    norm_weight_D = _tensor(4096) if has_norm else None
    result = value_head_loss(
        hidden_ND, weight_D, _tensor(1), torch.ones(16), torch.ones(16), head=head, loss=loss, clip=clip,
        old_value_N=torch.zeros(16), cu_seqlens_S1=_CU_SEQLENS, norm_weight_D=norm_weight_D,
    )  # fmt: skip
    result.total.backward()
    value_head(hidden_ND, weight_D, _tensor(1), head=head, norm_weight_D=norm_weight_D).sum().backward()


def _advantage() -> None:
    for outcome_S, num_values in ((_tensor(2), 18), (_tensor(2), 16), (None, 18)):
        advantage_T = advantage(outcome_S, _tensor(num_values), _CU_SEQLENS)
        advantage_T.sum().backward()
    whiten(advantage_T, torch.zeros(16, dtype=torch.int64))
    whitened_advantage(
        torch.ones(2), torch.zeros(18), _CU_SEQLENS, torch.zeros(2, dtype=torch.int64), num_populations=1
    )


def _policy_loss(kind: PolicyLossKind, *, has_all: bool) -> None:
    plain_T = torch.zeros(16)
    options: dict[str, Any] = {
        "ref_logprob_T": plain_T,
        "kl_coef": 0.1,
        "sampler_logprob_T": plain_T,
        "importance_cap": 2.0,
    }
    result = policy_loss(
        _tensor(16), plain_T, plain_T, torch.ones(16), _CU_SEQLENS, kind=kind, entropy_T=_tensor(16), entropy_coef=0.1,
        **(options if has_all else {}),
    )  # fmt: skip
    result.total.backward()


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def _source(op: str, launch: Launch) -> Source:
    """Types and promises of a launch, as Triton's own just-in-time compiler would specialise them."""
    signature, constants, divisible = {}, dict(launch.constants), []
    for parameter in launch.kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[name]
        if isinstance(value, Tensor):
            signature[name] = f"*{_TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                divisible.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(name)
    function = launch.kernel.fn
    return Source(
        op, function.__module__, function.__name__, signature, constants, tuple(divisible), launch.num_warps, launch.num_stages
    )  # fmt: skip


_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32",
    torch.int64: "i64", torch.int32: "i32", torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


def compile_source(source: Source, target: str) -> Compiled:
    """One kernel for one target, and what is wrong with it."""
    from importlib import import_module

    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    device = DEVICES[target]
    kernel = getattr(import_module(source.module), source.kernel)
    index = {name: place for place, name in enumerate(kernel.arg_names)}
    ast = ASTSource(
        fn=kernel,
        signature=source.signature,
        constexprs={(index[name],): value for name, value in source.constants.items()},
        attrs={(index[name],): [["tt.divisibility", 16]] for name in source.divisible},
    )
    options = {"num_warps": source.num_warps, "num_stages": source.num_stages, "enable_fp_fusion": True}
    binary = triton.compile(
        ast, target=GPUTarget(device.target.backend, device.target.arch, device.warp_size), options=options
    )
    read = _read_cuda if device.target.backend == "cuda" else _read_hip
    registers, spills, mma = read(binary.asm, device.matrix_instruction)
    shared = binary.metadata.shared
    has_half_product = re.search(r"tt\.dot .*(bf16|f16)>", binary.asm["ttir"]) is not None
    problems = []
    if spills:
        problems.append(f"{spills} bytes of registers spilled")
    if shared > device.max_shared:
        problems.append(f"{shared} bytes of shared memory, {target} has {device.max_shared}")
    if has_half_product and not mma:
        problems.append(f"no matrix instruction ({device.matrix_instruction})")
    if re.search(r"\bf64\b", binary.asm["ttgir"]):
        problems.append("float64 arithmetic")
    return Compiled(source.op, source.kernel.strip("_"), target, registers, spills, shared, mma, tuple(problems))


def _read_cuda(asm: dict[str, Any], matrix_instruction: str) -> tuple[int, int, int]:
    """(registers, stack bytes, matrix instructions) from the machine code, by NVIDIA's tools that come with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        code = _run(knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, f"cuobjdump printed no resource usage: {usage}"
    return int(found[1]), int(found[2]), len(re.findall(matrix_instruction, code))


def _read_hip(asm: dict[str, Any], matrix_instruction: str) -> tuple[int, int, int]:
    """(registers, spilled bytes, matrix instructions) from the assembly's own notes."""
    code = asm["amdgcn"]
    notes = {
        name: int(value)
        for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s*(\d+)", code)
    }
    spills = 4 * (notes["vgpr_spill_count"] + notes["sgpr_spill_count"])
    return notes["vgpr_count"], spills, len(re.findall(matrix_instruction, code))


def _run(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True).stdout
