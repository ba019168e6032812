"""tempo-engine: train, report, compare, eval, recipes, data, export, import, plan, doctor, bench. Only commands import torch:
--help is quick."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="tempo-engine",
    help="Test-time training of reasoning models: TEMPO's EM loop and its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Change a value of the recipe; repeatable, the last wins."),
]


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe.yaml, or the name of a packaged recipe.")],
    settings: Settings = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="[auto|PATH]",
            help="Go on with a run: its folder, or auto for --run-dir (a new run if there is none).",
        ),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME-METHOD-seedN.")] = None,
    start: Annotated[
        Path | None,
        typer.Option(help="Begin the EM loop where this run's began (same seed, data, models): for comparing methods."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and resolve the recipe, build its parts, print it, stop.")
    ] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes on this machine, one a GPU; default 1.")
    ] = None,
) -> None:
    """Run a recipe from cold start to exported models. Under torchrun, this process is one of its ranks."""
    from tempo_em.commands import train_command

    raise typer.Exit(train_command(recipe, settings or [], resume, run_dir, start, dry_run, nproc))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    to: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page; default RUN/report.html, needed with several runs.")
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write it again every few seconds until the runs are finished.")
    ] = False,
) -> None:
    """Write one HTML page on runs, which needs no network: what they showed, curves, samples, time, recipe."""
    from tempo_em.commands import report_command

    raise typer.Exit(report_command(runs, to, watch))


@app.command()
def compare(
    comparison: Annotated[str, typer.Argument(help="Path of a comparison.yaml, or the name of a packaged comparison.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder of its runs; default runs/NAME. What is finished there stays.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 2,
    into: Annotated[
        Path | None, typer.Option(help="Also put tables and figure into this Markdown file, between its marks.")
    ] = None,
) -> None:
    """Run methods against each other, from one start and with equal work, over bases and seeds; tables and curves."""
    from tempo_em.commands import compare_command

    raise typer.Exit(compare_command(comparison, out, jobs, into))


@app.command(name="eval")
def evaluate(
    run_or_model: Annotated[Path, typer.Argument(help="A run folder, or a Hugging Face model directory.")],
    recipe: Annotated[str | None, typer.Option(help="Recipe with the evaluation sets; default: the run's own.")] = None,
    settings: Settings = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the metrics to this file.")] = None,
) -> None:
    """Evaluate a finished run's policy and critic, or any model, on a recipe's evaluation sets."""
    from tempo_em.commands import eval_command

    raise typer.Exit(eval_command(run_or_model, recipe, settings or [], json_file))


@app.command()
def recipes(
    copy: Annotated[
        str | None, typer.Option(metavar="NAME", help="Write this recipe to NAME.yaml here, to edit.")
    ] = None,
) -> None:
    """List the packaged recipes and methods."""
    from tempo_em.commands import recipes_command

    raise typer.Exit(recipes_command(copy))


@app.command()
def data() -> None:
    """List the data sets that a recipe can name: where they come from, their licence, how they are asked."""
    from tempo_em.commands import data_command

    raise typer.Exit(data_command())


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder, finished or not.")],
    target: Annotated[
        Path, typer.Option("--to", metavar="DIR", help="A new folder: gets policy/, critic/ and a card.")
    ],
    step: Annotated[int | None, typer.Option(help="Of the checkpoint; default: the newest.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Also upload it to this repository of the Hugging Face Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --push: a repository that only you see.")] = False,
) -> None:
    """Write a checkpoint's policy and critic as Hugging Face models, with a model card."""
    if push:  # else every command is offline
        os.environ.setdefault("HF_HUB_OFFLINE", "0")
    from tempo_em.commands import export_command

    raise typer.Exit(export_command(run, target, step, push, private))


@app.command(name="import")
def import_model(
    gguf: Annotated[str, typer.Argument(help="A .gguf file, or the name of an installed package that brings one.")],
    target: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new folder, for model.path of a recipe.")],
) -> None:
    """Write a GGUF file's model as a Hugging Face directory, its weights dequantised."""
    from tempo_em.commands import import_command

    raise typer.Exit(import_command(gguf, target))


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe.yaml, or the name of a packaged recipe.")],
    settings: Settings = None,
    gpu: Annotated[
        str | None,
        typer.Option(help="h100, h200, b200, mi300x, a100 or cpu; default: h100 for bfloat16, else cpu."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs (processes) of one node; default 8, on a cpu 1.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file.")] = None,
) -> None:
    """Predict memory and time of a run from its configs alone; exit code 1 when it does not fit, with what would."""
    from tempo_em.commands import plan_command

    raise typer.Exit(plan_command(recipe, settings or [], gpu, gpus, nodes, json_file))


@app.command()
def doctor(
    recipe: Annotated[str, typer.Argument(help="Path of a recipe.yaml, or the name of a packaged recipe.")] = "tiny",
    mismatch: Annotated[
        bool, typer.Option("--mismatch", help="Only compare sampler and trainer, without looking at the machine.")
    ] = False,
    iterations: Annotated[int, typer.Option(min=1, help="Of sampling, scoring, updating and syncing.")] = 3,
    settings: Settings = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write what was found to this file.")] = None,
) -> None:
    """Look at this machine, then run the recipe without learning: sampler and trainer must agree on every log-prob, and where they
    do not, the first token and layer are named. Exit code 1 when something is wrong. Writes no run folder."""
    from tempo_em.commands import doctor_command

    raise typer.Exit(doctor_command(recipe, settings or [], mismatch, iterations, json_file))


bench = typer.Typer(help="Measure: kernels against kernels, whole RL steps against other stacks.", no_args_is_help=True)
app.add_typer(bench, name="bench")


@bench.command()
def kernels(
    is_compile: Annotated[
        bool,
        typer.Option(
            "--compile", help="Compile every kernel ahead of time and report registers, spills, shared memory."
        ),
    ] = False,
    target: Annotated[
        list[str] | None, typer.Option(help="With --compile: sm_80, sm_90, sm_100 or gfx942; repeatable. Default: all.")
    ] = None,
    case: Annotated[
        list[str] | None, typer.Option(help="Only cases whose name contains this; repeatable. Default: all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes: checks the peers, says nothing about speed.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Time each op against named peers, after checking that both compute the same; or compile all kernels (--compile)."""
    from tempo_em.commands import bench_kernels_command

    raise typer.Exit(bench_kernels_command(is_compile, target or [], case or [], quick, json_file))


@bench.command()
def throughput(
    case: Annotated[
        list[str] | None,
        typer.Option(help="tiny, mixed, vocabulary, prompts, smollm2 or tempo; repeatable. Default: all."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Ours: local or sglang. Default: sglang on a GPU where it is installed.")
    ] = None,
    python: Annotated[
        list[str] | None,
        typer.Option(help="STACK=PATH: the python of a stack that lives in its own environment; repeatable."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small shapes, one round: checks all sides, says nothing about speed.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Time a whole RL step (sample, score, update) against other stacks, after checking that all do the same work."""
    from tempo_em.commands import bench_throughput_command

    raise typer.Exit(bench_throughput_command(case or [], sampler, python or [], quick, json_file))


def main() -> None:
    """Entry point: `--resume` may stand without a value; mistakes of the user end in one sentence and exit code 2."""
    arguments = sys.argv[1:]
    for i, argument in enumerate(arguments):
        if argument == "--resume" and (i + 1 == len(arguments) or arguments[i + 1].startswith("-")):
            arguments[i] = "--resume=auto"
    app(arguments)
