"""The trainer against plain Hugging Face ones: tokens per CPU-second, peak memory, two ranks against one, growth of memory.

    python benchmarks/trainer.py [--case mixed|vocabulary|ranks|growth] [--quick] [--json FILE]

    mixed        sequences of 16 to 512 tokens (lognormal), an ordinary vocabulary; float32 and bfloat16
    vocabulary   the same lengths, 151,936 tokens in the vocabulary and a small trunk
    ranks        the engine on two processes of one thread each against one, in tokens per second
    growth       peak memory against tokens of a micro-batch and against the vocabulary; draws figures/trainer_growth.png

trainer_sides.py says what each side does. Before anything is timed, the gradient of every parameter, the loss, the entropy and the
gradient's norm are held against the padded trainer's; a difference makes the command exit with 1. Peak memory is that of a fresh
process during its first update.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tempo_em.plot import COLOURS
from tempo_kernels.bench.report import commit, device_name
from torch import Tensor
from trainer_sides import SIDES, UPDATES, Side, Trainer, Update, Work, trainer

FOLDER = Path(__file__).parent
# Of the relative difference of any parameter's gradient from the padded trainer's in float32. In bfloat16 every side is off.
LIMITS = {"float32": 1e-5, "bfloat16": 0.1}
# Of two ranks from one: in some tensors rows nearly cancel.
RANKS_LIMIT = 5e-5
# What a row is about; targets are for both updates, one after the other.
OPS: dict[str, tuple[Update, ...]] = {
    "policy_update": ("policy",), "critic_update": ("critic",), "both_updates": ("policy", "critic"),
}  # fmt: skip
# Freed memory goes back to the system at once, on every side: what is resident is what is in use.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
# Runs of several processes are comparable when nobody else uses more than this part of a core.
QUIET = 0.1
MIB = 2**20

Row = dict[str, Any]
Trainers = dict[Update, dict[Side, Trainer]]
Times = dict[tuple[Update, Side], list[float]]  # CPU seconds of each repeat


def qwen3(hidden_size: int, layers: int, vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3", "hidden_size": hidden_size, "num_hidden_layers": layers, "vocab_size": vocab_size,
        "intermediate_size": 3 * hidden_size, "num_attention_heads": hidden_size // 32, "head_dim": 32,
        "num_key_value_heads": hidden_size // 64, "tie_word_embeddings": True,
    }  # fmt: skip


def lognormal(count: int) -> list[int]:
    """Tokens of whole sequences: median 120, 16 to 512. The response lengths of the sampler's benchmark times four."""
    return [int(n) for n in np.clip(np.random.default_rng(0).lognormal(4.8, 0.7, count), 16, 512)]


# --- Against the plain trainers ----------------------------------------------------------------------------------------------


def mixed(quick: bool) -> list[Row]:
    work = Work(qwen3(256, 4, 8192), lognormal(64), 4096)
    if quick:
        work = Work(qwen3(64, 2, 512), lognormal(24), 2048)
    repeats = 1 if quick else 5
    return compare("mixed", work, repeats, 1.5) + compare("mixed", replace(work, dtype="bfloat16"), repeats)


def vocabulary(quick: bool) -> list[Row]:
    work = Work(qwen3(256, 4, 151_936), lognormal(16), 2048)
    if quick:
        work = Work(qwen3(64, 1, 16_384), lognormal(8), 1024)
    return compare("vocabulary", work, 1 if quick else 3, 1.2, memory_target=1 / 3)


def compare(
    case: str, work: Work, repeats: int, target: float | None = None, *, memory_target: float | None = None
) -> list[Row]:
    """A row for each op and peer. Nothing is timed when the gradients of any side are wrong."""
    trainers: Trainers = {update: {side: trainer(side, update, work) for side in SIDES} for update in UPDATES}
    errors = {update: differences(work, update, sides) for update, sides in trainers.items()}
    is_right = all(errors[u][side] <= LIMITS[work.dtype] for u in UPDATES for side in SIDES)
    times = in_turn(trainers, repeats) if is_right else {}
    del trainers
    peaks = {(update, side): memory(side, update, work)["peak_bytes"] for update, side in times}
    rows = []
    for op, updates in OPS.items():
        for peer in SIDES[1:]:
            error = {u: {side: errors[u][side] for side in ("engine", peer)} for u in updates}
            row: Row = {"op": op, "case": case, "dtype": work.dtype, "peer": peer, "checked": is_right, "error": error}
            if is_right:
                row["unit"] = "tokens per CPU-second"
                seconds = (np.sum([times[u, side] for u in updates], axis=0) for side in ("engine", peer))
                row |= speeds(sum(work.lengths), *seconds)
                ours, theirs = (max(peaks[u, side] for u in updates) for side in ("engine", peer))
                row |= {"peak_bytes": ours, "peer_peak_bytes": theirs, "memory_ratio": ours / theirs}
            if op == "both_updates" and peer == "padded":
                row |= {"target": target, "memory_target": memory_target}
            rows.append(row)
    return rows


def speeds(num_tokens: int, ours: Any, theirs: Any) -> Row:
    """Tokens a second of both sides, medians and quartiles over repeats. Padding is no token."""
    low, middle, high = np.percentile(num_tokens / np.stack([ours, theirs]), (25, 50, 75), axis=1).tolist()
    return {
        "ours": middle[0], "theirs": middle[1], "ratio": middle[0] / middle[1],
        "quartiles": [[low[0], high[0]], [low[1], high[1]]], "repeats": len(ours),
    }  # fmt: skip


def differences(work: Work, update: Update, sides: dict[Side, Trainer]) -> dict[Side, float]:
    """First updates of all sides: the largest relative difference of any metric, and of any parameter's gradient, from those of
    the padded trainer in float32."""
    found: dict[Side, dict[str, Tensor]] = {side: first_update(one) for side, one in sides.items()}
    truth = found["padded"]
    if work.dtype != "float32":
        truth = first_update(trainer("padded", update, replace(work, dtype="float32")))
    return {side: largest_difference(tensors, truth) for side, tensors in found.items()}


def first_update(one: Trainer) -> dict[str, Tensor]:
    metrics = one.update()
    return {name: torch.tensor(value) for name, value in metrics.items()} | one.moments()


def largest_difference(tensors: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> float:
    """Of any tensor: norm of the difference over its norm. NaN when there is one, infinite when names differ."""
    if tensors.keys() != truth.keys():
        return float("inf")
    relative = [(tensors[name].view_as(want) - want).norm() / want.norm() for name, want in truth.items()]
    return float(torch.stack(relative).max())


def in_turn(trainers: Trainers, repeats: int) -> Times:
    """Every side's update in turn, again and again: a drift of the machine's speed hits all of them."""
    times: Times = {(update, side): [] for update in trainers for side in trainers[update]}
    for _ in range(repeats):
        for (update, side), seconds in times.items():
            start = time.process_time()
            trainers[update][side].update()
            seconds.append(time.process_time() - start)
    return times


# --- Processes of their own --------------------------------------------------------------------------------------------------


def worker(*arguments: str, work: Work, ranks: int = 1, environment: Mapping[str, str] = {}) -> dict[str, Any]:
    """What trainer_worker.py found, and how many cores other processes used meanwhile (`others`)."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *torchrun, str(FOLDER / "trainer_worker.py"), *arguments, json.dumps(asdict(work))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    start, others = time.perf_counter(), busy_seconds()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    used = (busy_seconds() - others) / (time.perf_counter() - start)
    return json.loads(done.stdout.splitlines()[-1]) | {"others": used}


def busy_seconds() -> float:
    """CPU time that processes other than this one and its children have used since the machine started. Linux only."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return total - sum(usage.ru_utime + usage.ru_stime for usage in own)


def memory(side: Side, update: Update, work: Work) -> dict[str, Any]:
    return worker("memory", side, update, work=work, environment=MALLOC)


def ranks(quick: bool) -> list[Row]:
    """One rank, two ranks, and two independent processes at once, in turn: two busy cores of a machine can be slower than one, and
    what two processes that share nothing reach together is the most that two ranks can. Runs count during which the machine was
    quiet, if there are any."""
    work = Work(qwen3(384, 8, 16_384), lognormal(48), 2048)
    if quick:
        work = Work(qwen3(128, 2, 2048), lognormal(16), 1024)
    with tempfile.TemporaryDirectory() as folder:
        rounds = [{n: speed(folder, work, n) for n in ("one", "two", "apart")} for _ in range(1 if quick else 3)]
        moments = {(u, n): load_file(Path(folder) / f"{u}-{n}.safetensors") for u in UPDATES for n in (1, 2)}
    errors = {u: largest_difference(moments[u, 2], moments[u, 1]) for u in UPDATES}
    quiet = [r for r in rounds if all(run["others"] < QUIET for run in r.values())] or rounds
    rows = []
    for op, updates in OPS.items():
        seconds = {n: [sum(r[n]["seconds"][u] for u in updates) for r in quiet] for n in ("one", "two", "apart")}
        row: Row = {"op": op, "case": "ranks", "dtype": work.dtype, "unit": "tokens per second", "rounds": rounds}
        row |= {"error": {u: {"two ranks": errors[u]} for u in updates}, "checked": max(errors.values()) <= RANKS_LIMIT}
        tokens, is_both = sum(work.lengths), op == "both_updates"
        rows.append(
            row
            | {"peer": "one rank"}
            | speeds(tokens, seconds["two"], seconds["one"])
            | {"target": 1.6 if is_both else None}
        )
        twice = [each / 2 for each in seconds["apart"]]  # each of the two does all the work
        rows.append(row | {"peer": "two processes apart"} | speeds(tokens, seconds["two"], twice))
    return rows


def speed(folder: str, work: Work, how: str) -> dict[str, Any]:
    """One run of the engine's updates on "one" or "two" ranks; or two processes that know nothing of each other ("apart"), of which
    the slower one counts."""
    if how != "apart":
        return worker("speed", folder, work=work, ranks={"one": 1, "two": 2}[how])
    with ThreadPoolExecutor(2) as pool, tempfile.TemporaryDirectory() as elsewhere:
        both = list(pool.map(lambda _: worker("speed", elsewhere, work=work), range(2)))
    seconds = {u: max(run["seconds"][u] for run in both) for u in UPDATES}
    return {"seconds": seconds, "others": min(run["others"] for run in both)}


# --- Growth ------------------------------------------------------------------------------------------------------------------


def growth(quick: bool) -> list[Row]:
    """Peak memory of a policy update of two micro-batches of equally long rows."""
    tokens = (1024, 2048) if quick else (1024, 2048, 4096, 8192, 16_384)
    vocabularies = (8192, 16_384) if quick else (8192, 16_384, 32_768, 65_536, 131_072, 262_144)
    work = {("tokens of a micro-batch", n): Work(qwen3(128, 4, 16_384), [256] * (n // 128), n) for n in tokens}
    work |= {("vocabulary", n): Work(qwen3(128, 4, n), [256] * 16, 2048) for n in vocabularies}
    rows: list[Row] = []
    for (axis, value), one in work.items():
        row: Row = {"op": "policy_update", "case": "growth", "dtype": one.dtype, "axis": axis, "value": value}
        found = {side: memory(side, "policy", one) for side in SIDES}
        metrics = {side: torch.tensor(list(run["metrics"].values())) for side, run in found.items()}
        error = {side: float((x / metrics["padded"] - 1).abs().max()) for side, x in metrics.items()}
        row |= {"checked": max(error.values()) <= LIMITS[one.dtype], "error": {"metrics": error}}
        rows.append(row | {"peak_bytes": {side: run["peak_bytes"] for side, run in found.items()}})
    if not quick:
        plot_growth(rows, FOLDER / "figures" / "trainer_growth.png")
    return rows


def slope(rows: list[Row], side: Side) -> float:
    """Bytes for one more token, or one more entry of the vocabulary: least squares through the upper half of the points."""
    upper = rows[len(rows) // 2 - 1 :]
    return float(np.polyfit([row["value"] for row in upper], [row["peak_bytes"][side] for row in upper], 1)[0])


def by_axis(rows: list[Row]) -> dict[str, list[Row]]:
    axes = dict.fromkeys(row["axis"] for row in rows)
    return {axis: [row for row in rows if row["axis"] == axis] for axis in axes}


def plot_growth(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True, sharey=True)
    figure.suptitle("Peak memory of a policy update, without weights")
    for axis, (name, points) in zip(axes, by_axis(rows).items(), strict=True):
        for side, colour in zip(SIDES, COLOURS, strict=False):
            label = f"{side}: {slope(points, side) / 1000:.1f} kB for each"
            y = [row["peak_bytes"][side] / MIB for row in points]
            axis.plot([row["value"] for row in points], y, marker="o", markersize=3, label=label, color=colour)
        axis.set(xlabel=name, xscale="log", yscale="log")
        axis.set_xticks([row["value"] for row in points], [f"{row['value'] // 1024}k" for row in points])
        axis.set_yticks([2**n for n in range(7, 14)], [f"{2**n:,}" for n in range(7, 14)])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
        axis.legend(loc="upper left", fontsize=8)
    axes[0].set(ylabel="MiB")
    figure.savefig(path, dpi=110)


# --- What a person reads -----------------------------------------------------------------------------------------------------

COLUMNS = {
    "case": lambda row: row["case"],
    "dtype": lambda row: row["dtype"],
    "op": lambda row: row["op"].replace("_", " "),
    "peer": lambda row: row["peer"],
    "ours": lambda row: with_quartiles(row, "ours", 0),
    "peer's": lambda row: with_quartiles(row, "theirs", 1),
    "ratio": lambda row: number(row.get("ratio"), ".2f"),
    "target": lambda row: number(row.get("target"), ".1f"),
    "ours, MiB": lambda row: number(row.get("peak_bytes"), ",.0f", MIB),
    "peer's, MiB": lambda row: number(row.get("peer_peak_bytes"), ",.0f", MIB),
    "memory ratio": lambda row: number(row.get("memory_ratio"), ".2f"),
    "largest difference": lambda row: f"{max(e for u in row['error'].values() for e in u.values()):.1e}",
}


def comparison_table(rows: list[Row]) -> str:
    """Tokens a second with quartiles (more is better), peak memory (less is better)."""
    cells = [[column(row) for column in COLUMNS.values()] for row in rows]
    return markdown([*COLUMNS], cells)


def growth_table(rows: list[Row]) -> str:
    """MiB at each point; the last row of an axis: bytes for one more token, or one more entry."""
    cells = []
    for axis, points in by_axis(rows).items():
        cells += [[axis, f"{p['value']:,}", *(f"{p['peak_bytes'][s] / MIB:,.0f}" for s in SIDES)] for p in points]
        cells.append([axis, "slope", *(f"{slope(points, side):,.0f} bytes" for side in SIDES)])
    return markdown(["axis", "value", *(f"{side}, MiB" for side in SIDES)], cells)


def markdown(head: list[str], cells: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_quartiles(row: Row, side: str, place: int) -> str:
    if side not in row:
        return "wrong"
    low, high = row["quartiles"][place]
    return f"{row[side]:,.0f} ({low:,.0f} to {high:,.0f})"


def number(x: float | None, form: str, unit: float = 1.0) -> str:
    return "" if x is None else format(x / unit, form)


CASES: dict[str, Callable[[bool], list[Row]]] = {
    "mixed": mixed, "vocabulary": vocabulary, "ranks": ranks, "growth": growth,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, help="one case; all when not given")
    parser.add_argument(
        "--quick", action="store_true", help="whether the script works, on small models: figures mean nothing"
    )
    parser.add_argument("--json", type=Path, help="write the rows into this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in [args.case] if args.case else CASES:
        found = CASES[case](args.quick)
        print((growth_table if case == "growth" else comparison_table)(found), end="\n\n", flush=True)
        rows += found
    if args.json:
        args.json.write_text(json.dumps({"device": device_name(), "commit": commit(), "rows": rows}, indent=1) + "\n")
    return 0 if all(row["checked"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
