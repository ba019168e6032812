"""What the commands do, and how their endings become exit codes: 0 done, 2 the user can mend it, 130/143 interrupted."""

import functools
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec

# Before transformers is imported: it must not look for a hub, nor print about optional image packages. Data sets that a recipe
# names are fetched from the Hub all the same, where the user did not forbid it.
os.environ.setdefault("TEMPO_HUB_OFFLINE", os.environ.get("HF_HUB_OFFLINE", "0"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from rich.console import Console
from tempo_engine.errors import Halted, Interrupted, NonFinite, UserError

from tempo_em.console import evaluation_line, make_display, summary_table
from tempo_em.launch import is_rank, launch, report_exit_code
from tempo_em.loading import ResolvedRecipe, load_recipe, packaged
from tempo_em.presets import PRESETS
from tempo_em.sinks import check_installed

P = ParamSpec("P")


def _exit_codes(command: Callable[P, int | None]) -> Callable[P, int]:
    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        warnings.filterwarnings("ignore", module="transformers")
        logging.getLogger("transformers").setLevel(logging.ERROR)
        code, message = 0, ""
        try:
            code = command(*args, **kwargs) or 0
        except UserError as error:
            code, message = 2, str(error)
        except (Halted, Interrupted, NonFinite) as stop:
            code, message = stop.code, " ".join([str(stop), *getattr(stop, "__notes__", ())])
        if message and int(os.environ.get("LOCAL_RANK", 0)) == 0:  # ranks of a machine fail alike
            print(f"tempo-engine: {message}", file=sys.stderr, flush=True)
        report_exit_code(code)
        if code and is_rank() and os.environ.get("RANK") != "0":
            time.sleep(3)  # the first rank to fail takes the others with it: let rank 0 speak first
        if is_rank():
            from tempo_engine import parallel

            parallel.leave(code)
        return code

    return wrapped


@_exit_codes
def train_command(
    recipe: str,
    settings: list[str],
    resume: str | None,
    run_dir: Path | None,
    start: Path | None,
    dry_run: bool,
    nproc: int | None = None,
) -> int | None:
    resolved = load_recipe(recipe, settings)
    check_installed(resolved.recipe.tracking)
    if dry_run:
        _dry_run(resolved)
        return None
    if resume not in (None, "auto"):
        if run_dir is not None and run_dir != Path(resume):
            raise UserError(f"--resume {resume} and --run-dir {run_dir} name two folders; give one")
        run_dir = Path(resume)
    r = resolved.recipe
    run_dir = run_dir or Path("runs") / f"{resolved.name}-{r.method}-seed{r.seed}"
    if resume not in (None, "auto") and not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"--resume {resume}: that is no run folder, it has no recipe.yaml")
    if nproc is not None and not is_rank():
        return launch(nproc, sys.argv[1:])
    from tempo_engine import parallel  # imports torch: a mistake in the recipe is answered before that

    from tempo_em.train import Training

    training = Training(resolved, run_dir, make_display(), resume=resume is not None, start_from=start)
    try:
        summary = training.run()
    except (Halted, Interrupted, NonFinite):  # all ranks end so, together
        parallel.stop()
        raise
    if parallel.is_main():
        console = Console()
        console.print(summary_table(summary["stages"]))
        console.print(f"curves, summary, samples and models are in {run_dir}", soft_wrap=True)
    parallel.stop()
    return None


@_exit_codes
def report_command(runs: list[Path], to: Path | None, watch: bool) -> None:
    from tempo_em.report.command import report

    report(runs, to, watch=watch, say=lambda line: print(line, flush=True))


@_exit_codes
def compare_command(comparison: str, out: Path | None, jobs: int, into: Path | None) -> None:
    from tempo_em.compare.command import compare

    folder = compare(comparison, out, jobs, into, lambda line: print(line, flush=True))
    Console().print(f"tables, curves and every number are in {folder}", soft_wrap=True)


def _dry_run(resolved: ResolvedRecipe) -> None:
    from tempo_em.plan.preflight import before_training

    if missing := before_training(resolved.recipe):
        print(resolved.to_yaml(), end="")
        print("".join(f"# before training: {what}\n" for what in missing), end="")
        print("# the recipe itself is fine; `tempo-engine plan` says what it needs of a machine; nothing was written")
        return
    from tempo_em.build import build
    from tempo_em.data_account import sentences

    parts = build(resolved.recipe)
    loop = parts.loop
    print(resolved.to_yaml(), end="")
    print("".join(f"# {sentence}\n" for sentence in sentences(parts.datasets)), end="")
    sizes = [f"{len(loop.labelled.items)} labelled", f"{len(loop.unlabelled.items)} unlabelled"]
    sizes += [f"{len(s.items)} {s.name} (evaluation)" for s in parts.evaluation_sets]
    parameters = sum(p.numel() for _, p in loop.policy.parameters())
    labelled, unlabelled = resolved.recipe.groups(resolved.recipe.em.labelled_share)
    print(f"# prompts: {', '.join(sizes)}")
    print("".join(f"# {text}\n" for text in parts.notes), end="")
    print(f"# policy: {type(loop.policy.model).__name__}, {parameters:,} parameters on {loop.policy.device}; critic: "
          f"{resolved.recipe.critic.backbone if loop.critic else 'none'}")  # fmt: skip
    print(f"# an iteration samples {labelled} labelled and {unlabelled} unlabelled prompts; nothing was written")


@_exit_codes
def eval_command(run_or_model: Path, recipe: str | None, settings: list[str], json_file: Path | None) -> None:
    is_run = (run_or_model / "recipe.yaml").is_file()
    if not is_run and not (run_or_model / "config.json").is_file():
        raise UserError(f"{run_or_model} is neither a run folder (recipe.yaml) nor a model directory (config.json)")
    model_dir = run_or_model / "policy" if is_run else run_or_model
    if is_run and not model_dir.is_dir():
        raise UserError(f"{run_or_model} has no exported policy: the run is not finished; go on with it by --resume")
    if recipe is None and not is_run:
        raise UserError("evaluating a model directory needs --recipe: it says on which questions")
    if json_file and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {json_file.parent} does not exist")
    as_exported: list[tuple[str, Any]] = [
        ("model.path", str(model_dir.resolve())), ("model.create", None), ("cold_start.steps", 0),
    ]  # fmt: skip
    critic_dir = run_or_model / "critic"
    if is_run and critic_dir.is_dir():
        as_exported += [("critic.path", str(critic_dir.resolve())), ("critic.backbone", "separate")]
    resolved = load_recipe(recipe or str(run_or_model / "recipe.yaml"), settings, as_exported)
    from tempo_engine.evaluate import evaluate
    from tempo_engine.tracking import plain

    from tempo_em.build import build
    from tempo_em.data_account import sentences

    parts = build(resolved.recipe)
    print("".join(f"{sentence}\n" for sentence in sentences(parts.datasets)), end="")
    loop = parts.loop
    critic = loop.critic if resolved.recipe.critic.path else None
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        loop.sampler.open(Path(folder), loop.policy)
        try:
            loop.sampler.load(loop.policy)
            for evaluation_set in parts.evaluation_sets:
                results[evaluation_set.name], *_ = evaluate(
                    loop.sampler, critic, resolved.recipe.critic.target_range, evaluation_set,
                    num_samples=resolved.recipe.evaluation.samples, micro_batch_tokens=resolved.recipe.micro_batch_tokens,
                    key="evaluation/eval",
                )  # fmt: skip
                print(evaluation_line(str(run_or_model), {evaluation_set.name: results[evaluation_set.name]}))
        finally:
            loop.sampler.close()
            for verifier in parts.verifiers:
                verifier.close()
    Console().print(summary_table({"now": results}))
    if json_file:
        json_file.write_text(json.dumps(plain(results), indent=1), encoding="utf-8")


@_exit_codes
def recipes_command(copy: str | None) -> None:
    ready = packaged("recipes")
    if copy is None:
        print("recipes:")
        for name, text in ready.items():
            print(f"  {name:18} {text.splitlines()[0].lstrip('# ')}")
        print("methods (method: NAME in a recipe, or --set method=NAME):")
        for name, (description, _) in PRESETS.items():
            print(f"  {name:18} {description}")
        return
    if copy not in ready:
        raise UserError(f"there is no packaged recipe {copy!r}; recipes: {', '.join(ready)}")
    target = Path(f"{copy}.yaml")
    if target.exists():
        raise UserError(f"{target} exists already; move it away first")
    target.write_text(ready[copy], encoding="utf-8")
    print(f"wrote {target}; run it with: tempo-engine train {target}")


@_exit_codes
def data_command() -> None:
    from tempo_engine.data.benchmarks import BENCHMARKS

    print(
        "data sets (dataset: NAME in a source of questions; fetched from the Hugging Face Hub when a run needs them):"
    )
    for name, benchmark in BENCHMARKS.items():
        hubs = list(
            dict.fromkeys(f"{p.hub}@{p.revision[:8] if p.revision else 'newest'}" for p in benchmark.parts.values())
        )
        more = f" and {len(hubs) - 1} more" if len(hubs) > 1 else ""
        print(f"  {name:22} {benchmark.about}")
        print(f"  {'':22} {hubs[0]}{more}; licence: {benchmark.licence}; {benchmark.verifier} in {benchmark.extract}")
        if len(benchmark.parts) > 1:
            print(f"  {'':22} subset: {', '.join(benchmark.parts)}")


@_exit_codes
def bench_kernels_command(
    is_compile: bool, targets: list[str], cases: list[str], quick: bool, json_file: Path | None
) -> int:
    from tempo_em.bench import bench_kernels, compile_report

    if is_compile and (cases or quick):
        raise UserError("--case and --quick choose what is timed; --compile times nothing: drop one of them")
    if targets and not is_compile:
        raise UserError("--target chooses what to compile for: add --compile")
    is_well = (
        compile_report(targets, json_file=json_file)
        if is_compile
        else bench_kernels(cases, quick=quick, json_file=json_file)
    )
    return 0 if is_well else 1


@_exit_codes
def bench_throughput_command(
    cases: list[str], sampler: str | None, pythons: list[str], quick: bool, json_file: Path | None
) -> int:
    from tempo_em.bench import bench_throughput

    is_well = bench_throughput(cases, sampler=sampler, pythons=pythons, quick=quick, json_file=json_file)
    return 0 if is_well else 1


@_exit_codes
def export_command(
    run_dir: Path, target: Path, step: int | None, repository: str | None = None, private: bool = False
) -> None:
    from tempo_em import hub
    from tempo_em.export import export_run

    if private and repository is None:
        raise UserError("--private is about --push USER/NAME: add that, or leave it out")
    api = hub.connect(repository) if repository else None
    written = export_run(run_dir, target, step)
    for path in written:
        print(f"wrote {path}")
    if repository and written:
        print(f"pushed to {hub.push(api, repository, target, private=private)}")


@_exit_codes
def import_command(where: str, target: Path) -> None:
    from tempo_engine.gguf import find_gguf, import_gguf

    import_gguf(find_gguf(where), target)
    print(f"wrote {target}")


@_exit_codes
def plan_command(
    recipe: str, settings: list[str], gpu: str | None, gpus: int | None, nodes: int, json_file: Path | None
) -> int:
    from tempo_em.plan.command import plan_recipe

    return 0 if plan_recipe(recipe, settings, gpu, gpus, nodes, json_file) else 1


@_exit_codes
def doctor_command(recipe: str, settings: list[str], mismatch: bool, iterations: int, json_file: Path | None) -> int:
    load_recipe(recipe, settings)  # a mistake in it is answered before torch is imported
    from tempo_em.doctor import diagnose

    is_well = diagnose(recipe, settings, iterations=iterations, json_file=json_file, machine=not mismatch)
    return 0 if is_well else 1
