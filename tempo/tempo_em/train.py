"""A run from its first to its last iteration: stages, evaluations, checkpoints, the run folder. Resumable at every iteration."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tempo_engine import checkpoint, export, parallel
from tempo_engine.checkpoint import Checkpoints
from tempo_engine.errors import Halted, Interrupted, NonFinite, UserError
from tempo_engine.evaluate import Judged, evaluate
from tempo_engine.optim import Optimizer
from tempo_engine.rollout import Rollout
from tempo_engine.tracking import MetricsFile, plain
from tempo_engine.verify import metrics_of
from tempo_engine.weights import copy_weights, named_weights

from tempo_em.alarms import Alarms
from tempo_em.build import Parts, build
from tempo_em.console import Display, Silence, evaluation_line
from tempo_em.data_account import check_unchanged, sentences, write_account
from tempo_em.loading import ResolvedRecipe
from tempo_em.plot import plot_run
from tempo_em.run_folder import Lock, begin_folder, check_start, has_other_questions, may_resume
from tempo_em.samples import sample_rows
from tempo_em.schedule import Stage
from tempo_em.sinks import Sinks
from tempo_em.waiting import Waiting


class Training:
    """One run in its folder.

    The position is (stage, iteration); together with weights, optimisers and cursors it determines everything that follows, because
    every random draw has a seed of its own occasion.
    """

    def __init__(
        self, resolved: ResolvedRecipe, run_dir: Path, display: Display, *, resume: bool, start_from: Path | None = None
    ) -> None:
        self.resolved, self.recipe = resolved, resolved.recipe
        parallel.start(timeout_minutes=self.recipe.parallel.timeout_minutes)
        self.run_dir, self.display = run_dir, display if parallel.is_main() else Silence()
        resumes = may_resume(self.recipe, run_dir, resume=resume)
        if start_from and not resumes:
            check_start(self.recipe, start_from)
        self.lock = Lock(run_dir)
        if resumes:
            self.lock.take()
        self.parts: Parts = build(self.recipe)
        for folder in [run_dir] if resumes else [start_from] if start_from else []:
            parallel.from_main(lambda folder=folder: check_unchanged(self.parts.datasets, folder))
        for sentence in sentences(self.parts.datasets):
            self.display.note(sentence)
        self.loop = self.parts.loop
        self.loop.clock.on_phase = self.display.phase
        self.loop.waiting, self.loop.note = Waiting(run_dir / "rollouts.json"), self.display.note
        for text in self.parts.notes:
            self.display.note(text)
        if self.loop.oracle:
            self.display.note(
                "posterior oracle: answers of data.unlabelled reach training; an upper bound, not a method"
            )
        self.stage, self.iteration, self.step = 0, 0, 0
        self.evaluations: dict[str, dict[str, dict[str, float]]] = {}
        self.tokens = {"generated": 0, "trained": 0, "em_generated": 0, "evaluation": 0}
        self.earlier_seconds: dict[str, float] = {}
        self.metrics = MetricsFile(run_dir / "metrics.jsonl")
        self.samples = MetricsFile(run_dir / "samples.jsonl")
        self.alarms = Alarms(self.recipe.alarms)
        self.interrupt: int | None = None
        self.interrupted_at = 0.0
        self.stages: list[tuple[str, int, Callable[[int], dict[str, float]]]] = []
        if self.parts.cold_start:
            self.stages.append(("cold_start", self.parts.cold_start.iterations, self.parts.cold_start.iterate))
        self.stages += [(stage.name, stage.iterations, _bind(self.loop.iterate, stage)) for stage in self.parts.stages]
        folder, how = run_dir / "checkpoints", self.recipe.checkpoint
        source = folder if resumes else start_from and start_from / "start"
        if source:
            saved = checkpoint.newest(source, self.display.note)
            self._restore(saved)
            if start_from and not resumes and has_other_questions(self.recipe, start_from):
                self.evaluations.clear()
            self.display.note(f"{'resuming' if resumes else 'starting'} from {saved}")
        if resumes:
            self.loop.waiting.find()
        else:
            self.lock.take()
            if parallel.is_main():
                begin_folder(resolved, run_dir, self.loop.policy.device)
                write_account(self.parts.datasets, run_dir)
                export.save_skeleton(self.loop.policy, self.parts.tokenizer, run_dir / "model")
            parallel.wait_for_all()
        self.checkpoints = Checkpoints(folder, keep=how.keep, asynchronous=how.asynchronous)
        self.sinks = Sinks(self.recipe.tracking if parallel.is_main() else None, self.display.note)

    def run(self) -> dict[str, Any]:
        """Run what is left; returns the summary. Raises Interrupted after saving when a signal arrives."""
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self.sinks.begin(self.recipe.model_dump(mode="json"), self.run_dir, self.step)
            self.loop.sampler.open(self.run_dir / "servers", self.loop.policy)
            while self.stage < len(self.stages):
                name, iterations, iterate = self.stages[self.stage]
                self._evaluate_at_start(name)
                self.display.begin(name, self.iteration, iterations)
                while self.iteration < iterations:
                    self._one_iteration(name, iterations, iterate)
                if name == "cold_start":
                    self._begin_from_cold_start()
                self.stage, self.iteration = self.stage + 1, 0
                if iterations:
                    self._save()
            self._evaluate("final")
            self.checkpoints.finish()
            return self._finish()
        except NonFinite as stop:
            self.checkpoints.finish()
            self._keep_batch(stop)
            raise
        except Halted as stop:
            self.checkpoints.finish()
            stop.add_note(f"go on with --resume {self.run_dir}")
            raise
        finally:
            self.loop.sampler.close()  # ends what is being sampled ahead
            self.loop.ahead.close()
            for verifier in self.parts.verifiers:
                verifier.close()
            self.sinks.close()
            self.lock.release()
            self.display.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _begin_from_cold_start(self) -> None:
        """What was copied from the untrained policy is copied again from the one that reinforcement begins with."""
        if self.parts.cold_start:
            self.parts.cold_start.optimizer.adamw.state.clear()  # twice the weights in memory, for nothing
        if self.loop.critic:
            self.loop.critic.copy_trunk()
        if self.loop.reference:
            copy_weights(self.loop.reference.model, self.loop.policy.model)

    def _keep_batch(self, stop: NonFinite) -> None:
        if parallel.is_main():
            path = self.run_dir / f"nonfinite-{self.step}.safetensors"
            save_file({name: x.cpu().contiguous() for name, x in stop.batch.items()}, path)
            stop.add_note(f"their last batch is in {path}")

    def _one_iteration(self, name: str, iterations: int, iterate: Callable[[int], dict[str, float]]) -> None:
        every = self.recipe.evaluation.every
        if name == "em" and every and self.iteration and self.iteration % every == 0:
            self._evaluate(f"em/{self.iteration}")
        start = time.perf_counter()
        with self.loop.clock.time(f"stage/{name}"):
            metrics = iterate(self.iteration)
        metrics |= self.loop.sampler.metrics() | metrics_of(self.parts.verifiers)
        seconds = time.perf_counter() - start
        self._count_tokens(name, metrics)
        metrics |= {
            f"timing_s/{phase}": s for phase, s in self.loop.clock.lap().items() if not phase.startswith("stage/")
        }
        metrics |= {"timing_s/step": seconds}
        if name == "em":
            metrics |= self._watch(metrics)
        if "tokens/generated" in metrics:
            metrics["perf/throughput"] = metrics["tokens/generated"] / seconds
        self.iteration, self.step = self.iteration + 1, self.step + 1
        self._log({"step": self.step, "stage": name, "iteration": self.iteration, **metrics})
        self.display.advance(name, self.iteration - 1, metrics)
        saves = self.recipe.checkpoint.every and self.iteration % self.recipe.checkpoint.every == 0
        if saves and self.iteration < iterations:
            self._save()
        self.checkpoints.poll()
        self._stop_if_asked()

    def _log(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.sinks.write(self.step, row)

    def _watch(self, metrics: dict[str, float]) -> dict[str, float]:
        alarms, sentences = self.alarms.look(metrics)
        for sentence in sentences:
            self.display.note(f"alarm, iteration {self.iteration + 1}: {sentence}; see alarms in the recipe")
        return alarms

    def _stop_if_asked(self) -> None:
        """After a signal: save and stop. What was not finished, an evaluation say, is done again by the resumed run."""
        asked = int(parallel.largest(self.interrupt or 0))  # of any rank
        if asked:
            self._save()
            self.checkpoints.finish()
            raise Interrupted(asked, self.run_dir)

    def _evaluate_at_start(self, stage: str) -> None:
        """`base` is the policy before any reinforcement, `start` the one the EM loop begins with."""
        first = len(self.stages) - len(self.parts.stages)
        if self.stage == first and "base" not in self.evaluations:
            self._evaluate("base", with_critic=False)
        if stage == "em" and self.iteration == 0:
            self.loop.freeze_critic()
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
        rollouts: dict[str, tuple[list[Rollout], Judged]] = {}
        with loop.clock.time("evaluation"):
            loop.sampler.load(loop.policy)
            for evaluation_set in self.parts.evaluation_sets:
                self._stop_if_asked()
                name = evaluation_set.name
                results[name], sampled, judged = evaluate(
                    loop.sampler,
                    critic,
                    self.recipe.critic.target_range,
                    evaluation_set,
                    num_samples=self.recipe.evaluation.samples,
                    micro_batch_tokens=self.recipe.micro_batch_tokens,
                    key=f"evaluation/{label}",
                )
                rollouts[name] = sampled, judged
        seconds = loop.clock.lap()["evaluation"]
        # Counted and written only now: an evaluation that a signal cut short is done again from its beginning.
        self.evaluations[label] = results
        for name, (sampled, judged) in rollouts.items():
            self.tokens["evaluation"] += sum(len(r.response_ids) for r in sampled)
            for row in sample_rows(sampled, judged, self.parts.tokenizer, step=self.recipe.evaluation.samples):
                self.samples.write({"evaluation": label, "set": name, **row})
        found: dict[str, Any] = {
            _verl_name(name, metric): value for name, metrics in results.items() for metric, value in metrics.items()
        }
        bins = {name: judged.reliability for name, (_, judged) in rollouts.items() if judged.reliability}
        found |= {"reliability": bins} if bins else {}
        self._log({"step": self.step, "evaluation": label, **found, "timing_s/evaluation": seconds})
        if results:
            self.display.note(evaluation_line(label, results))

    def _critic_is_fitted(self) -> bool:
        optimizer = self.loop.critic_optimizer
        return optimizer is not None and (optimizer.num_steps > 0 or self.recipe.critic.path is not None)

    def _count_tokens(self, stage: str, metrics: dict[str, float]) -> None:
        generated = int(metrics.get("tokens/generated", 0))
        self.tokens["generated"] += generated
        self.tokens["em_generated"] += generated if stage == "em" else 0
        self.tokens["trained"] += int(sum(v for k, v in metrics.items() if k.startswith("tokens/trained")))

    def _on_signal(self, number: int, frame: object) -> None:
        if self.interrupt is not None:
            # A second Ctrl-C means it. Launchers send the same signal twice: to the group, and once more to each rank.
            if number == signal.SIGINT and time.monotonic() - self.interrupted_at > 1.0:
                raise KeyboardInterrupt
            return
        self.interrupt, self.interrupted_at = number, time.monotonic()
        self.display.note(
            f"{signal.Signals(number).name}: finishing this iteration, then saving (again to stop at once)"
        )

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Everything of the run that is a tensor, by name."""
        tensors = {f"{owner}/{name}": p.detach() for owner, named in self._weights().items() for name, p in named}
        for owner, optimizer in self._optimizers().items():
            tensors |= {f"{owner}/{name}": value for name, value in optimizer.state().items()}
        return tensors

    def _weights(self) -> dict[str, list[tuple[str, torch.Tensor]]]:
        """What is trained, and buffers; of the reference the same as of the policy."""
        loop = self.loop
        trained = {name for name, _ in loop.policy.parameters()}
        models: dict[str, torch.nn.Module] = {"policy": loop.policy.model}
        if loop.reference:  # frozen, but not what any file says: it may have been copied after the cold start
            models["reference"] = loop.reference.model
        weights = {
            owner: [
                (name, x)
                for name, x in named_weights(model).items()
                if name in trained or not isinstance(x, torch.nn.Parameter)
            ]
            for owner, model in models.items()
        }
        if loop.critic:
            buffers = [
                (n, x) for n, x in named_weights(loop.critic.scope).items() if not isinstance(x, torch.nn.Parameter)
            ]
            weights["critic"] = [*loop.critic.parameters(), *buffers]
            if loop.frozen_critic:
                names = {name for name, _ in weights["critic"]}
                frozen = named_weights(loop.frozen_critic.scope).items()
                weights["frozen_critic"] = [(name, x) for name, x in frozen if name in names]
        return weights

    def _optimizers(self) -> dict[str, Optimizer]:
        loop = self.loop
        optimizers = {"policy_optimizer": loop.policy_optimizer}
        if loop.critic_optimizer:
            optimizers["critic_optimizer"] = loop.critic_optimizer
        if self.parts.cold_start and self.stage == 0:
            optimizers["cold_start_optimizer"] = self.parts.cold_start.optimizer
        return optimizers

    def _save(self) -> None:
        with self.loop.clock.time("checkpoint"):
            self.checkpoints.save(self.step, self._tensors(), self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "iteration": self.iteration,
            "step": self.step,
            "policy_version": self.loop.policy.version,
            "cadence": self.loop.cadence.state(),
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

    def _restore(self, saved: Path) -> None:
        loop, state = self.loop, checkpoint.read_state(saved)
        self.stage, self.iteration, self.step = state["stage"], state["iteration"], state["step"]
        self.evaluations, self.tokens, self.earlier_seconds = state["evaluations"], state["tokens"], state["seconds"]
        loop.labelled.position, loop.unlabelled.position = state["cursors"]["labelled"], state["cursors"]["unlabelled"]
        loop.policy.version = state["policy_version"]
        if "cadence" in state:
            loop.cadence.load_state(state["cadence"])
        weights = {f"{owner}/{name}": p for owner, named in self._weights().items() for name, p in named}
        missing = {name.split("/")[0] for name in weights.keys() - checkpoint.load_tensors(saved, dict(weights))}
        if loop.reference and "reference" in missing:  # where another run began without one, so does this one's KL
            copy_weights(loop.reference.model, loop.policy.model)
        if missing - {"reference", "frozen_critic"}:  # the latter is copied when the EM loop begins
            owner = min(missing - {"reference", "frozen_critic"})
            raise UserError(f"the saved state has no {owner}; start from a run of a method that has one")
        for owner, optimizer in self._optimizers().items():
            into = {f"{owner}/{name}": tensor for name, tensor in optimizer.blank_state().items()}
            filled = checkpoint.load_tensors(saved, into)
            if filled:
                optimizer.load_state({name.removeprefix(f"{owner}/"): into[name] for name in filled})
        self.metrics.cut(state["metrics_size"])
        self.samples.cut(state["samples_size"])
        for row in self.metrics.rows() if parallel.is_main() else []:
            if row.get("stage") == "em":
                self.alarms.look(row)

    def _finish(self) -> dict[str, Any]:
        """Summary, curves and exports."""
        named = {label: self.evaluations[label] for label in ("base", "start", "final") if label in self.evaluations}
        summary = {
            "recipe": self.resolved.name, "method": self.recipe.method, "seed": self.recipe.seed,
            "stages": named, "seconds": self._seconds(), "tokens": self.tokens,
        }  # fmt: skip
        if self.recipe.checkpoint.export:
            export.export_policy(self.loop.policy, self.parts.tokenizer, self.run_dir / "policy")
            if self.loop.critic:
                export.export_critic(self.loop.critic, self.parts.tokenizer, self.run_dir / "critic")
        if parallel.is_main():
            self._publish(summary)
        return summary

    def _publish(self, summary: dict[str, Any]) -> None:
        plot_run(self.metrics.rows(), self.run_dir / "curves.png", title=f"{self.resolved.name}: {self.recipe.method}")
        # Last, and in one piece: a run with a summary is a finished run.
        temporary = self.run_dir / ".summary.json"
        temporary.write_text(json.dumps(plain(summary), indent=1), encoding="utf-8")
        temporary.replace(self.run_dir / "summary.json")


def _bind(iterate: Callable[[Stage, int], dict[str, float]], stage: Stage) -> Callable[[int], dict[str, float]]:
    return lambda iteration: iterate(stage, iteration)


def _verl_name(set_name: str, metric: str) -> str:
    """verl's names for evaluation metrics, so that its dashboards find them."""
    is_core = metric.startswith(("mean@", "maj@", "pass@"))
    return f"val-core/{set_name}/acc/{metric}" if is_core else f"val-aux/{set_name}/{metric}"
