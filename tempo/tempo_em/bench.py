"""`tempo-engine bench kernels`: time the kernels against their peers, or compile them for GPUs that are not here.
`tempo-engine bench throughput`: time whole RL steps against those of other stacks."""

import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from tempo_engine.errors import UserError

if TYPE_CHECKING:
    from tempo_em.throughput.work import SamplerName

# Qwen3-8B: hidden size, vocabulary; and the tokens of a usual minibatch.
HIDDEN_SIZE, VOCAB_SIZE, NUM_TOKENS = 4096, 151936, 8192


def bench_kernels(cases: list[str], *, quick: bool, json_file: Path | None) -> bool:
    """Print one table of our ops against each peer; whether all of ours computed what they should."""
    from tempo_kernels.bench import run_benchmarks, table, write_json

    _check_writable(json_file)
    console = _console()
    with console.status("measuring") as status:
        try:
            rows = run_benchmarks(
                cases,
                quick=quick,
                progress=lambda row: status.update(f"measured {row.op} {row.case} against {row.peer}"),
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    console.print(table(rows))
    if json_file is not None:
        write_json(json_file, rows)
    return not any(row.note.startswith("ours:") for row in rows)


def bench_throughput(
    names: list[str], *, sampler: str | None, pythons: list[str], quick: bool, json_file: Path | None
) -> bool:
    """Print one table of whole steps against each stack; whether ours computed what they should and all did equal work.
    `pythons`: "stack=interpreter" for stacks in environments of their own. `sampler`: ours; by default SGLang on a GPU."""
    from tempo_em.throughput.cases import CASES, missing
    from tempo_em.throughput.measure import measure
    from tempo_em.throughput.report import table, write_json

    _check_writable(json_file)
    for name in names:
        if name not in CASES:
            raise UserError(f"no case is called {name!r}; cases: {', '.join(CASES)}")
        if missing(name):
            raise UserError(missing(name))
    interpreters = _interpreters(pythons)
    ours = _sampler(sampler)
    console = _console()
    rows = []
    with console.status("measuring") as status:
        for name in names or CASES:
            if missing(name):
                console.print(missing(name))
            else:
                rows += measure(name, quick=quick, sampler=ours, pythons=interpreters, progress=status.update)
    console.print(table(rows))
    if json_file is not None:
        write_json(json_file, rows)
    return all(row.is_ours_right for row in rows)


def _sampler(name: str | None) -> "SamplerName":
    import torch

    has_sglang, has_gpu = importlib.util.find_spec("sglang") is not None, torch.cuda.is_available()
    if name not in (None, "local", "sglang"):
        raise UserError(f"--sampler {name}: it is local or sglang")
    if name == "sglang" and not has_gpu:
        raise UserError("--sampler sglang needs a GPU: on a CPU its servers' time is not in the CPU-seconds of a step")
    if name == "sglang" and not has_sglang:
        raise UserError("--sampler sglang: sglang is not installed")
    return "sglang" if has_gpu and has_sglang and name != "local" else "local"


def _interpreters(pythons: list[str]) -> dict[str, str]:
    from tempo_em.throughput.stacks import STACKS

    found = {}
    for text in pythons:
        stack, _, path = text.partition("=")
        if stack not in STACKS:
            raise UserError(f"--python {text}: no stack is called {stack!r}; stacks: {', '.join(STACKS)}")
        if shutil.which(path) is None:
            raise UserError(f"--python {text}: {path!r} is not a program; it takes STACK=PATH of a python")
        found[stack] = path
    return found


def compile_report(targets: list[str], *, json_file: Path | None) -> bool:
    """Print registers, spills, shared memory and matrix instructions of every kernel, and the floors; whether all is well."""
    from tempo_kernels.bench import write_json
    from tempo_kernels.compile import DEVICES, compile_kernels

    _check_writable(json_file)
    console = _console()
    with console.status("compiling") as status:
        try:
            rows = compile_kernels(
                targets or list(DEVICES), on_row=lambda row: status.update(f"compiled {row.op} for {row.target}")
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    report = Table(title="Kernels, compiled ahead of time")
    for heading in ("op", "kernel", "target"):
        report.add_column(heading)
    for heading in ("registers", "spilled bytes", "shared bytes", "matrix instr."):
        report.add_column(heading, justify="right")
    report.add_column("problems")
    for row in rows:
        numbers = (str(x) for x in (row.registers, row.spills, row.shared, row.mma))
        report.add_row(
            row.op, row.kernel, row.target, *numbers, f"[red]{', '.join(row.problems)}" if row.problems else ""
        )
    console.print(report)
    console.print(_floors())
    if json_file is not None:
        write_json(json_file, rows)
    problems = sum(bool(row.problems) for row in rows)
    console.print(f"{len(rows)} kernels, {problems} with problems")
    return not problems


def _floors() -> Table:
    """What each op must compute and move, and how long an H100 needs for that."""
    from tempo_kernels import cost

    T, D, V = NUM_TOKENS, HIDDEN_SIZE, VOCAB_SIZE
    table = Table(title=f"Least work of a pass, T={T} tokens, D={D}, V={V} (Qwen3-8B), bf16; floor on an H100 SXM")
    table.add_column("op")
    for heading in ("TFLOP", "GB moved", "GB of memory", "floor ms"):
        table.add_column(heading, justify="right")
    forward, backward = cost.linear_logprob_forward, cost.linear_logprob_backward
    rows = {f"linear_logprob forward, {mode}": forward(T, D, V, mode=mode) for mode in ("STORE", "SLAB")}
    rows |= {f"linear_logprob backward, {mode}": backward(T, D, V, mode=mode) for mode in ("STORE", "SLAB")}
    rows["linear_logprob backward, NOBUF of 16 MiB"] = backward(T, D, V, mode="NOBUF", max_bytes=2**24)
    rows["gather_logprob forward"] = cost.gather_logprob_forward(T, V)
    rows["gather_logprob backward"] = cost.gather_logprob_backward(T, V)
    rows["value_head forward"] = cost.value_head_forward(T, D)
    rows["value_head backward"] = cost.value_head_backward(T, D)
    rows["advantage, whitened"] = cost.advantage(T)
    rows["policy_loss"] = cost.policy_loss(T)
    for name, least in rows.items():
        numbers = (least.flops / 1e12, least.bytes_moved / 1e9, least.memory / 1e9, cost.H100.floor_ms(least))
        table.add_row(name, *(f"{x:.2g}" if x < 0.1 else f"{x:.2f}" for x in numbers))
    return table


def _console() -> Console:
    """A table that goes to a file or a pipe has no window to fit into."""
    console = Console()
    return console if console.is_terminal else Console(width=220)


def _check_writable(json_file: Path | None) -> None:
    if json_file is not None and not json_file.parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {json_file.parent} does not exist")
