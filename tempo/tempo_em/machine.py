"""What `tempo-engine doctor` says of a machine before anything is run on it: packages, processors, kernels, servers, room."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from packaging.requirements import Requirement
from tempo_engine.errors import UserError, first_sentence
from tempo_engine.sglang.server import check_can_start
from tempo_kernels import advantage, compile, dispatch

from tempo_em.recipe import Recipe
from tempo_em.servers import check_urls

GIB = 2**30
# Checkpoints of the smallest recipes need less; with less than this, logs and samples fill the disk too.
LEAST_DISK, LEAST_MEMORY = 2 * GIB, 2 * GIB


class Check(NamedTuple):
    """`state`: ok; note, which a person may want to know; bad, which a run would trip over."""

    name: str
    state: Literal["ok", "note", "bad"]
    found: str


def examine_machine(recipe: Recipe, folder: Path) -> Iterator[Check]:
    """One check after another. `folder`: where runs will be."""
    yield Check(
        "python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    )
    yield from packages()
    yield processor()
    yield from accelerators(recipe)
    yield kernels()
    yield triton_compiles()
    yield servers(recipe)
    yield memory()
    yield disk(folder)


def packages() -> Iterator[Check]:
    """What the engine needs, in versions that it takes; and each extra, installed or how to get it."""
    missing, found, extras = [], [], {}
    for text in requires("tempo-engine") or []:
        need = Requirement(text)
        extra = next((name for name in EXTRAS if need.marker and f'extra == "{name}"' in str(need.marker)), None)
        if need.marker and not need.marker.evaluate({"extra": extra or ""}):
            continue
        installed = _installed(need.name)
        if extra:
            extras.setdefault(extra, []).append(f"{need.name} {installed}" if installed else None)
        elif installed is None or not need.specifier.contains(installed, prereleases=True):
            missing.append(f"{need} (found {installed or 'none'})")
        elif need.name in ("torch", "triton", "transformers", "safetensors"):
            found.append(f"{need.name} {installed}")
    if missing:
        yield Check(
            "packages", "bad", f"missing or of another version: {', '.join(missing)}; install tempo-engine again"
        )
    else:
        yield Check("packages", "ok", ", ".join(found))
    for extra, parts in extras.items():
        here = all(parts)
        yield Check(extra, "ok" if here else "note", ", ".join(filter(None, parts)) if here else EXTRAS[extra])


EXTRAS = {
    "flash-attn": "not installed: attention pads or masks instead of reading packed rows (GPUs only)",
    "lora": "not installed: model.lora needs it, pip install 'tempo-engine[lora]'",
    "gguf": "not installed: tempo-engine import needs it, pip install 'tempo-engine[gguf]'",
    "sglang": "not installed: rollout.backend sglang needs it; on a CPU make sglang-cpu, else pip install 'tempo-engine[sglang]'",
}


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    half = [name for name, flag in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")) if flag in flags]
    capability = torch.backends.cpu.get_cpu_capability()
    said = f"bfloat16 in hardware ({', '.join(half)})" if half else "no bfloat16 in hardware: use float32 on this CPU"
    return Check("processor", "ok", f"{cores} cores, {capability}, {said}, {torch.get_num_threads()} threads of torch")


def accelerators(recipe: Recipe) -> Iterator[Check]:
    """Each GPU that torch sees, with its driver; or why it sees none although there is one."""
    driver = _driver()
    if not torch.cuda.is_available():
        if driver and "error" not in driver.lower():
            yield Check(
                "gpu",
                "bad",
                f"there is one (driver {driver}), but torch {torch.__version__} cannot use it: install a CUDA build",
            )
        else:
            yield Check("gpu", "note", "none: everything runs on the CPU")
        return
    build = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name, (major, minor) = torch.cuda.get_device_name(number), torch.cuda.get_device_capability(number)
        said = f"{name}, sm_{major}{minor}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, {build}, driver {driver or 'unknown'}"
        yield Check(f"gpu {number}", "note" if free < 0.5 * total else "ok", said)
    if recipe.model.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        yield Check("bfloat16", "bad", "this GPU has none; set model.dtype: float32")


def _driver() -> str | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def kernels() -> Check:
    """Whether Triton or PyTorch runs the ops here, and why."""
    choice = os.environ.get("TEMPO_KERNELS", "auto")
    x = torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu")
    try:
        by_triton = dispatch.use_triton(x)
    except ValueError as error:
        return Check("kernels", "bad", str(error))
    why = f"TEMPO_KERNELS={choice}" if choice != "auto" else "there is a GPU" if x.is_cuda else "there is no GPU"
    if choice == "auto" and x.is_cuda and not by_triton:
        return Check(
            "kernels", "bad", "PyTorch, because triton is not installed: the ops need far more memory that way"
        )
    return Check("kernels", "ok", f"{'Triton' if by_triton else 'PyTorch'}, because {why}")


def triton_compiles() -> Check:
    """One kernel: on a GPU compiled, run and held against PyTorch; without one compiled for an H100."""
    if dispatch.triton is None:
        return Check("triton", "note", f"there is none for {platform.system()}: PyTorch runs the ops")
    if dispatch.IS_INTERPRETED:
        return Check(
            "triton", "note", "TRITON_INTERPRET is set: kernels run in Python, slowly, and nothing is compiled"
        )
    try:
        if torch.cuda.is_available():
            return _runs_on_gpu()
        source = next(s for s in compile.sources("sm_90") if s.op.startswith("advantage"))
        compiled = compile.compile_source(source, "sm_90")
    except Exception as error:  # of the compiler, the assembler, the driver
        return Check("triton", "bad", f"a kernel cannot be compiled: {first_sentence(error)}")
    said = f"compiles for sm_90 ({compiled.kernel}: {compiled.registers} registers, {compiled.spills} bytes spilled)"
    return Check("triton", "bad" if compiled.problems else "ok", said)


def _runs_on_gpu() -> Check:
    value_T, outcome_S = torch.arange(6.0, device="cuda"), torch.tensor([1.0, 0.0], device="cuda")
    cu_seqlens_S1 = torch.tensor([0, 4, 6], device="cuda")
    with _kernels_by("triton"):
        ours = advantage(outcome_S, value_T, cu_seqlens_S1)
    with _kernels_by("torch"):
        wanted = advantage(outcome_S, value_T, cu_seqlens_S1)
    if not torch.equal(ours, wanted):
        return Check("triton", "bad", f"a kernel computes {ours.tolist()} where PyTorch finds {wanted.tolist()}")
    return Check("triton", "ok", "a kernel was compiled, ran, and agrees with PyTorch")


@contextmanager
def _kernels_by(choice: str) -> Iterator[None]:
    before = os.environ.get("TEMPO_KERNELS")
    os.environ["TEMPO_KERNELS"] = choice
    try:
        yield
    finally:
        if before is None:
            del os.environ["TEMPO_KERNELS"]
        else:
            os.environ["TEMPO_KERNELS"] = before


def servers(recipe: Recipe) -> Check:
    """Whether the recipe's servers can be started, or answer."""
    if recipe.rollout.backend != "sglang":
        return Check("rollouts", "ok", "the local sampler, in the trainer's process")
    how = recipe.rollout.sglang
    try:
        if how.servers == "auto":
            check_can_start(how.replicas, how.port)
            return Check("rollouts", "ok", "SGLang can be started here")
        key = os.environ.get(how.key_variable, "")
        check_urls(how.servers, how.allowed_hosts, key=key, dtype=recipe.model.dtype)
        return Check("rollouts", "ok", f"SGLang answers at {', '.join(how.servers)}")
    except UserError as error:
        return Check("rollouts", "bad", str(error))


def memory() -> Check:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
    if "MemAvailable" not in sizes:
        return Check("memory", "note", "unknown on this system")
    free, total = sizes["MemAvailable"], sizes["MemTotal"]
    said = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    shared = Path("/dev/shm")
    if shared.is_dir():
        said += f", {shutil.disk_usage(shared).free / GIB:.1f} GiB in /dev/shm"
    return Check("memory", "bad" if free < LEAST_MEMORY else "ok", said)


def disk(folder: Path) -> Check:
    """Room where runs are written. `tempo-engine plan` says how much a recipe's checkpoints need."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    return Check("disk", "bad" if free < LEAST_DISK else "ok", f"{free / GIB:.1f} GiB free for {folder}")
