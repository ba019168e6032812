"""A run from its first to its last iteration: stages, evaluations, checkpoints, the run folder. Resumable at every iteration."""

import json
import platform
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from tempo_engine import checkpoint
from tempo_engine.errors import Interrupted, UserError
from tempo_engine.evaluate import evaluate
from tempo_engine.rollout import Rollout
from tempo_engine.tracking import MetricsFile, plain

from tempo_em.build import Parts, build
from tempo_em.console import Display, evaluation_line
from tempo_em.loading import ResolvedRecipe
from tempo_em.plot import plot_run
from tempo_em.recipe import Recipe
from tempo_em.schedule import Stage

# Settings that change neither weights nor data: a resumed run may differ in them.
RESUME_MAY_CHANGE = ("checkpoint.", "evaluation.every")
# What happens before the EM loop: runs that start from the same point agree in these.
START_MUST_SHARE = ("seed", "model.", "critic.", "data.", "rollout.", "cold_start.", "initialisation.")


class Training:
    """One run in its folder.

    The position is (stage, iteration); together with weights, optimisers and cursors it determines everything that follows, because
    every random draw has a seed of its own occasion.
    """

    def __init__(
        self, resolved: ResolvedRecipe, run_dir: Path, display: Display, *, resume: bool, start_from: Path | None = None
    ) -> None:
        self.resolved, self.recipe = resolved, resolved.recipe
        self.run_dir, self.display = run_dir, display
        saved = self._open(resume)
        resumes = saved is not None
        self.parts: Parts = build(self.recipe)
        self.loop = self.parts.loop
        self.loop.clock.on_phase = display.phase
        self.stage, self.iteration, self.step = 0, 0, 0
        self.evaluations: dict[str, dict[str, dict[str, float]]] = {}
        self.tokens = {"generated": 0, "trained": 0, "em_generated": 0, "evaluation": 0}
        self.earlier_seconds: dict[str, float] = {}
        self.metrics = MetricsFile(run_dir / "metrics.jsonl")
        self.samples = MetricsFile(run_dir / "samples.jsonl")
        self.interrupt: int | None = None
        self.stages: list[tuple[str, int, Callable[[int], dict[str, float]]]] = []
        if self.parts.cold_start:
            self.stages.append(("cold_start", self.parts.cold_start.iterations, self.parts.cold_start.iterate))
        self.stages += [(stage.name, stage.iterations, _bind(self.loop.iterate, stage)) for stage in self.parts.stages]
        if not resumes and start_from:
            _check_same_recipe(self.recipe, start_from, lambda path: path.startswith(START_MUST_SHARE))
            saved = checkpoint.load_newest(start_from / "start", display.note)
        if saved:
            self._restore(*saved[:2])
            display.note(f"{'resuming' if resumes else 'starting'} from {saved[2]}")
        if not resumes:
            self._write_folder()

    def _open(self, resume: bool) -> tuple[dict[str, torch.Tensor], dict[str, Any], Path] | None:
        """The newest checkpoint of a run to resume; None where there is nothing to resume yet.

        Raises UserError when the folder is in use and nobody asked to resume, or belongs to another recipe.
        """
        if self.run_dir.exists() and not self.run_dir.is_dir():
            raise UserError(f"the run folder {self.run_dir} is a file; choose another --run-dir")
        is_empty = not self.run_dir.exists() or not any(self.run_dir.iterdir())
        if not is_empty and not resume:
            raise UserError(
                f"the run folder {self.run_dir} is not empty; add --resume to go on with it, or choose another --run-dir"
            )
        if is_empty:
            return None
        _check_same_recipe(self.recipe, self.run_dir, lambda path: not path.startswith(RESUME_MAY_CHANGE))
        if checkpoint.list_checkpoints(self.run_dir / "checkpoints"):
            return checkpoint.load_newest(self.run_dir / "checkpoints", self.display.note)
        return None  # killed before its first checkpoint: it begins again

    def run(self) -> dict[str, Any]:
        """Run what is left; returns the summary. Raises Interrupted after saving when a signal arrives."""
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            while self.stage < len(self.stages):
                name, iterations, iterate = self.stages[self.stage]
                self._evaluate_at_start(name)
                self.display.begin(name, self.iteration, iterations)
                while self.iteration < iterations:
                    self._one_iteration(name, iterations, iterate)
                if name == "cold_start" and self.loop.critic:
                    self.loop.critic.copy_trunk(self.loop.policy)
                self.stage, self.iteration = self.stage + 1, 0
                if iterations:
                    self._save()
            self._evaluate("final")
            return self._finish()
        finally:
            self.display.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _one_iteration(self, name: str, iterations: int, iterate: Callable[[int], dict[str, float]]) -> None:
        every = self.recipe.evaluation.every
        if name == "em" and every and self.iteration and self.iteration % every == 0:
            self._evaluate(f"em/{self.iteration}")
        start = time.perf_counter()
        with self.loop.clock.time(f"stage/{name}"):
            metrics = iterate(self.iteration)
        self.loop.sampler.load(self.loop.policy)
        seconds = time.perf_counter() - start
        self._count_tokens(name, metrics)
        metrics |= {
            f"timing_s/{phase}": s for phase, s in self.loop.clock.lap().items() if not phase.startswith("stage/")
        }
        metrics |= {"timing_s/step": seconds}
        if "tokens/generated" in metrics:
            metrics["perf/throughput"] = metrics["tokens/generated"] / seconds
        self.iteration, self.step = self.iteration + 1, self.step + 1
        self.metrics.write({"step": self.step, "stage": name, "iteration": self.iteration, **metrics})
        self.display.advance(name, self.iteration - 1, metrics)
        saves = self.recipe.checkpoint.every and self.iteration % self.recipe.checkpoint.every == 0
        if saves and self.iteration < iterations:
            self._save()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """After a signal: save and stop. What was not finished, an evaluation say, is done again by the resumed run."""
        if self.interrupt is not None:
            self._save()
            raise Interrupted(self.interrupt, self.run_dir)

    def _evaluate_at_start(self, stage: str) -> None:
        """`base` is the policy before any reinforcement, `start` the one the EM loop begins with."""
        if stage != "cold_start" and "base" not in self.evaluations:
            self._evaluate("base", with_critic=False)
        if stage == "em" and "start" not in self.evaluations:
            self._evaluate("start")
            # Kept for runs of other methods that shall begin at the same point (--start).
            checkpoint.save(self.run_dir / "start", self.step, self._tensors(), self._state(), keep=1)

    def _evaluate(self, label: str, *, with_critic: bool = True) -> None:
        if label in self.evaluations:
            return
        loop = self.loop
        critic = loop.critic if with_critic and self._critic_is_fitted() else None
        results: dict[str, dict[str, float]] = {}
        rollouts: dict[str, list[Rollout]] = {}
        with loop.clock.time("evaluation"):
            for evaluation_set in self.parts.evaluation_sets:
                self._stop_if_asked()
                name = evaluation_set.name
                results[name], rollouts[name] = evaluate(
                    loop.sampler,
                    critic,
                    self.recipe.critic.target_range,
                    evaluation_set,
                    num_samples=self.recipe.evaluation.samples,
                    micro_batch_tokens=self.recipe.micro_batch_tokens,
                    key=f"evaluation/{label}",
                )
        loop.clock.lap()
        # Counted and written only now: an evaluation that a signal cut short is done again from its beginning.
        self.evaluations[label] = results
        for name, sampled in rollouts.items():
            self.tokens["evaluation"] += sum(len(r.response_ids) for r in sampled)
            self._write_samples(label, name, sampled)
        row = {
            _verl_name(name, metric): value for name, metrics in results.items() for metric, value in metrics.items()
        }
        self.metrics.write({"step": self.step, "evaluation": label, **row})
        if results:
            self.display.note(evaluation_line(label, results))

    def _critic_is_fitted(self) -> bool:
        optimizer = self.loop.critic_optimizer
        return optimizer is not None and (optimizer.num_steps > 0 or self.recipe.critic.path is not None)

    def _write_samples(self, label: str, set_name: str, rollouts: list[Rollout]) -> None:
        """The first sample of the first prompts, to read what the numbers are made of."""
        step = self.recipe.evaluation.samples
        for rollout in rollouts[: 8 * step : step]:
            text = {"prompt": rollout.prompt.text, "response": rollout.text}
            self.samples.write({"evaluation": label, "set": set_name, **text})

    def _count_tokens(self, stage: str, metrics: dict[str, float]) -> None:
        generated = int(metrics.get("tokens/generated", 0))
        self.tokens["generated"] += generated
        self.tokens["em_generated"] += generated if stage == "em" else 0
        self.tokens["trained"] += int(sum(v for k, v in metrics.items() if k.startswith("tokens/trained")))

    def _on_signal(self, number: int, frame: object) -> None:
        if self.interrupt is not None:  # the second one means it
            raise KeyboardInterrupt
        self.interrupt = number
        self.display.note(
            f"{signal.Signals(number).name}: finishing this iteration, then saving (again to stop at once)"
        )

    def _write_folder(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for leftover in (self.metrics, self.samples):
            leftover.path.unlink(missing_ok=True)
        (self.run_dir / "recipe.yaml").write_text(self.resolved.to_yaml(), encoding="utf-8")
        packages = {name: version(name) for name in ("tempo-engine", "torch", "transformers", "safetensors", "numpy")}
        environment = {
            "argv": sys.argv[1:], "python": platform.python_version(), "platform": platform.platform(), **packages,
            "device": str(self.loop.policy.device), "threads": torch.get_num_threads(),
        }  # fmt: skip
        (self.run_dir / "environment.json").write_text(json.dumps(environment, indent=1), encoding="utf-8")

    def _tensors(self) -> dict[str, torch.Tensor]:
        loop, tensors = self.loop, {}
        named: dict[str, dict[str, Any]] = {
            "policy": dict(loop.policy.parameters()),
            "policy_optimizer": loop.policy_optimizer.state(),
        }
        if loop.critic and loop.critic_optimizer:
            named |= {"critic": dict(loop.critic.parameters()), "critic_optimizer": loop.critic_optimizer.state()}
        if self.parts.cold_start and self.stages[min(self.stage, len(self.stages) - 1)][0] == "cold_start":
            named["cold_start_optimizer"] = self.parts.cold_start.optimizer.state()
        for owner, values in named.items():
            tensors |= {f"{owner}/{name}": value for name, value in values.items()}
        return tensors

    def _save(self) -> None:
        with self.loop.clock.time("checkpoint"):
            folder = self.run_dir / "checkpoints"
            checkpoint.save(folder, self.step, self._tensors(), self._state(), keep=self.recipe.checkpoint.keep)

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "iteration": self.iteration,
            "step": self.step,
            "policy_version": self.loop.policy.version,
            "cursors": {"labelled": self.loop.labelled.position, "unlabelled": self.loop.unlabelled.position},
            "evaluations": self.evaluations,
            "tokens": self.tokens,
            "seconds": self._seconds(),
            "metrics_size": self.metrics.size,
            "samples_size": self.samples.size,
        }

    def _seconds(self) -> dict[str, float]:
        """Seconds per phase, those before a resume included."""
        total, earlier = self.loop.clock.total, self.earlier_seconds
        return {phase: total.get(phase, 0.0) + earlier.get(phase, 0.0) for phase in {**earlier, **total}}

    def _restore(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        loop = self.loop
        self.stage, self.iteration, self.step = state["stage"], state["iteration"], state["step"]
        self.evaluations, self.tokens, self.earlier_seconds = state["evaluations"], state["tokens"], state["seconds"]
        loop.labelled.position, loop.unlabelled.position = state["cursors"]["labelled"], state["cursors"]["unlabelled"]
        loop.policy.version = state["policy_version"]
        owners = {"policy": loop.policy.parameters(), "critic": loop.critic.parameters() if loop.critic else []}
        with torch.no_grad():
            for owner, parameters in owners.items():
                for name, parameter in parameters:
                    if f"{owner}/{name}" not in tensors:
                        raise UserError(f"the saved state has no {owner}; start from a run of a method that has one")
                    parameter.copy_(tensors[f"{owner}/{name}"])
        optimizers = {"policy_optimizer": loop.policy_optimizer, "critic_optimizer": loop.critic_optimizer}
        if self.parts.cold_start:
            optimizers["cold_start_optimizer"] = self.parts.cold_start.optimizer
        for owner, optimizer in optimizers.items():
            own = {name.removeprefix(f"{owner}/"): t for name, t in tensors.items() if name.startswith(f"{owner}/")}
            if optimizer and own:
                optimizer.load_state(own)
        loop.sampler.load(loop.policy)
        self.metrics.cut(state["metrics_size"])
        self.samples.cut(state["samples_size"])

    def _finish(self) -> dict[str, Any]:
        """Summary, curves and exports."""
        named = {label: self.evaluations[label] for label in ("base", "start", "final") if label in self.evaluations}
        summary = {
            "recipe": self.resolved.name, "method": self.recipe.method, "seed": self.recipe.seed,
            "stages": named, "seconds": self._seconds(), "tokens": self.tokens,
        }  # fmt: skip
        if self.recipe.checkpoint.export:
            checkpoint.export_policy(self.loop.policy, self.parts.tokenizer, self.run_dir / "policy")
            if self.loop.critic:
                checkpoint.export_critic(self.loop.critic, self.parts.tokenizer, self.run_dir / "critic")
        plot_run(self.metrics.rows(), self.run_dir / "curves.png", title=f"{self.resolved.name}: {self.recipe.method}")
        # Last, and in one piece: a run with a summary is a finished run.
        temporary = self.run_dir / ".summary.json"
        temporary.write_text(json.dumps(plain(summary), indent=1), encoding="utf-8")
        temporary.replace(self.run_dir / "summary.json")
        return summary


def _bind(iterate: Callable[[Stage, int], dict[str, float]], stage: Stage) -> Callable[[int], dict[str, float]]:
    return lambda iteration: iterate(stage, iteration)


def _verl_name(set_name: str, metric: str) -> str:
    """verl's names for evaluation metrics, so that its dashboards find them."""
    is_core = metric.startswith(("mean@", "maj@", "pass@"))
    return f"val-core/{set_name}/acc/{metric}" if is_core else f"val-aux/{set_name}/{metric}"


def _check_same_recipe(recipe: Recipe, run_dir: Path, matters: Callable[[str], bool]) -> None:
    """Raises UserError naming the first setting that matters and differs from the run's."""
    file = run_dir / "recipe.yaml"
    if not file.is_file():
        raise UserError(f"{run_dir} is not a run folder: it has no recipe.yaml")
    saved = _flat(yaml.safe_load(file.read_text(encoding="utf-8")))
    wanted = _flat(recipe.model_dump(mode="json"))
    for path in sorted({*saved, *wanted}):
        before, now = saved.get(path), wanted.get(path)
        if before != now and matters(path):
            raise UserError(
                f"{run_dir} was started with {path} = {before!r}, the recipe now says {now!r}; make them agree"
            )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix.rstrip("."): value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}
