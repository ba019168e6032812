"""`tempo-engine doctor`: is this machine fit (machine.py), and do sampler and trainer compute the same? A loop that changes
nothing, and where they part."""

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from tempo_engine.divergence import (
    TOLERANCES,
    Layer,
    Outputs,
    Token,
    Tolerance,
    cached_layers,
    compare_layers,
    first_diverging_layer,
    first_diverging_token,
    same_wave,
    trainer_layers,
)
from tempo_engine.errors import Halted, UserError
from tempo_engine.packing import PackedBatch
from tempo_engine.rollout import Rollout
from tempo_engine.samplers.sglang import SGLangSampler
from tempo_engine.sglang.dump import differing_weights, server_layers
from tempo_engine.tracking import plain

from tempo_em.build import Parts, build
from tempo_em.loading import ResolvedRecipe, load_recipe
from tempo_em.machine import Check, examine_machine
from tempo_em.recipe import Recipe
from tempo_em.schedule import EMLoop, Scored, Stage
from tempo_em.waiting import Sampled

Say = Callable[[str], None]
# Names of the metrics on a line, and how they are written.
SHOWN = (
    ("logprob_diff_mean", "mean |d|", ".2e"), ("logprob_diff_max", "max |d|", ".2e"), ("mismatch_kl", "kl", ".2e"),
    ("ess_token", "ess of tokens", ".4f"), ("ess_sequence", "of sequences", ".4f"), ("outside_band", "outside band", ".2%"),
)  # fmt: skip
# Without learning, differences have no reason to grow from iteration to iteration.
GROWTH = 2.0
# Growth of less than this share of the tolerance is not looked at.
NOTHING = 0.01


@dataclass
class Verdict:
    """What was found. Without drift there is neither token nor layer; `weights` are tensors that a server holds otherwise."""

    dtype: str
    sampler: str
    tolerance: Tolerance
    iterations: list[dict[str, float]] = field(default_factory=list)
    drift: str = ""
    token: dict[str, Any] | None = None
    weights: list[str] = field(default_factory=list)
    layer: Layer | None = None
    layers: list[Layer] = field(default_factory=list)
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """For a file: no NaN."""
        rows = {
            "iterations": [plain(row) for row in self.iterations],
            "layers": [plain(asdict(x)) for x in self.layers],
        }
        layer = None if self.layer is None else plain(asdict(self.layer))
        return (
            plain(vars(self)) | rows | {"tolerance": asdict(self.tolerance), "token": plain(self.token), "layer": layer}
        )


def diagnose(where: str, settings: list[str], *, iterations: int, json_file: Path | None, machine: bool) -> bool:
    """Look at the `machine`, load the recipe, run the loop, print what was found; whether all is well."""
    if json_file is not None and not json_file.absolute().parent.is_dir():
        raise UserError(f"--json {json_file}: the folder {json_file.parent} does not exist")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("doctor works in one process; start it without torchrun")
    resolved, recipe = without_learning(where, settings), load_recipe(where, settings).recipe
    checks = _checks(recipe) if machine else []
    rollout = recipe.rollout
    if rollout.top_p < 1 or rollout.top_k > 0:
        print("top_p and top_k are left out: log-probs of a truncated distribution are not the trainer's")
    parts = build(resolved.recipe)
    with tempfile.TemporaryDirectory(prefix="tempo-doctor-") as folder:
        try:
            parts.loop.sampler.open(Path(folder) / "sampler", parts.loop.policy)
            verdict = examine(parts, iterations, Path(folder), print)
        finally:
            parts.loop.sampler.close()
            parts.loop.ahead.close()
            for verifier in parts.verifiers:
                verifier.close()
    if json_file is not None:
        found = {"recipe": resolved.name, "machine": [check._asdict() for check in checks]} | verdict.to_json()
        json_file.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return not verdict.drift and not any(check.state == "bad" for check in checks)


def _checks(recipe: Recipe) -> list[Check]:
    checks = []
    for check in examine_machine(recipe, Path("runs")):
        print(f"{check.state:5} {check.name:11} {check.found}")
        checks.append(check)
    return checks


def without_learning(where: str, settings: list[str]) -> ResolvedRecipe:
    """The recipe with learning rates of 0 and everything off that is not sampling, scoring, updating or syncing."""
    recipe = load_recipe(where, settings).recipe
    overrides: list[tuple[str, Any]] = [
        ("mstep.optim.lr", 0.0), ("estep.optim.lr", 0.0), ("cold_start.steps", 0),
        ("mstep.old_logprob", "trainer"), ("mstep.kl_coef", 0.0), ("rollout.ahead", 0), ("rollout.partial", False),
        ("rollout.top_p", 1.0), ("rollout.top_k", 0), ("em.dynamic_sampling", False), ("em.entropy_band", None),
        ("estep.filter", "none"),
        ("rollout.mismatch.every", 1), ("rollout.mismatch.warn_above", None), ("rollout.mismatch.correct_above", None),
        ("rollout.mismatch.stop_above", None),
    ]  # fmt: skip
    if recipe.rollout.sglang.servers == "auto":  # servers of others may see this folder only
        overrides.append(("rollout.sglang.sync_folder", None))
    return load_recipe(where, settings, overrides)


def examine(parts: Parts, iterations: int, folder: Path, say: Say) -> Verdict:
    """Sample, score, update with learning rates of 0 and sync, so many times or until sampler and trainer part.

    The sampler must be open; servers are closed when a layer has to be found. What is written goes into the folder.
    """
    loop, stage = parts.loop, next(stage for stage in parts.stages if stage.name == "em")
    recipe, tolerance = loop.recipe, TOLERANCES[loop.policy.sharding.compute]
    verdict = Verdict(recipe.model.dtype, recipe.rollout.backend, tolerance)
    say(f"sampler {verdict.sampler}, {verdict.dtype}, learning rates of 0")
    for iteration in range(iterations):
        sampled = loop.sample(stage, iteration)
        scored = loop.score(stage, sampled.labelled, sampled.unlabelled, iteration)
        metrics = {name.removeprefix("rollout/"): value for name, value in scored.metrics.items()}
        verdict.iterations.append(metrics)
        shown = "  ".join(f"{title} {metrics[name]:{form}}" for name, title, form in SHOWN)
        say(f"iteration {iteration + 1}/{iterations}  {shown}")
        verdict.drift = beyond(verdict.iterations, tolerance)
        if verdict.drift:
            say(f"drift: {verdict.drift}")
            _locate(parts, sampled, scored, folder, verdict, say)
            return verdict
        _update(loop, stage, sampled, scored, iteration)
    say(f"no drift: {_explained(tolerance, verdict.dtype)}")
    return verdict


def beyond(iterations: Sequence[Mapping[str, float]], tolerance: Tolerance) -> str:
    """What rounding does not explain in the last of these iterations' metrics, or nothing."""
    last = iterations[-1]
    bounds = (
        ("logprob_diff_max", tolerance.largest),
        ("logprob_diff_mean", tolerance.mean),
        ("mismatch_kl", tolerance.kl),
    )
    titles = {name: title for name, title, _ in SHOWN}
    for name, bound in bounds:
        if not last[name] <= bound:
            return f"{titles[name]} is {last[name]:.3g}, more than the {bound:g} that rounding explains"
    means = [row["logprob_diff_mean"] for row in iterations]
    grows = len(means) > 2 and all(b > a for a, b in pairwise(means)) and means[-1] > GROWTH * means[0]
    if grows and means[-1] > NOTHING * tolerance.mean:
        return f"mean |d| grows, from {means[0]:.3g} to {means[-1]:.3g}, although nothing learns"
    return ""


def _explained(tolerance: Tolerance, dtype: str) -> str:
    largest = f"max |d| <= {tolerance.largest:g}, " if math.isfinite(tolerance.largest) else ""
    bounds = f"{largest}mean |d| <= {tolerance.mean:g}, kl <= {tolerance.kl:g}"
    return f"what differs is rounding in {dtype} ({bounds}), and it does not grow"


def _update(loop: EMLoop, stage: Stage, sampled: Sampled, scored: Scored, iteration: int) -> None:
    """Both steps, as in an iteration of a run; the next one begins with a sync of the weights."""
    loop.e_step(sampled, key := f"{stage.name}/{iteration}")
    loop.m_step(stage, scored, sampled, key)


# --- Where ---------------------------------------------------------------------------------------------------------------------


def _locate(parts: Parts, sampled: Sampled, scored: Scored, folder: Path, verdict: Verdict, say: Say) -> None:
    """Fill in token, layer or weights."""
    assert scored.batch is not None, "nothing was sampled"
    assert scored.old_logprob_T is not None
    em = parts.loop.recipe.em
    token = first_diverging_token(scored.batch, scored.old_logprob_T, verdict.tolerance)
    is_labelled = token.row >= len(sampled.unlabelled)
    rollouts, size = (sampled.labelled, em.labelled_group_size) if is_labelled else (sampled.unlabelled, em.group_size)
    row = token.row - len(sampled.unlabelled) * is_labelled
    text = parts.tokenizer.decode([token.id])
    verdict.token = {"prompt": rollouts[row].prompt.id, "sample": row % size, "text": text} | asdict(token)
    say(
        f"first diverging token: prompt {rollouts[row].prompt.id}, sample {row % size}, position {token.position} of the response, "
        f"{text!r} ({token.id}): log-prob {token.sampler_logprob:.6g} of the sampler, {token.trainer_logprob:.6g} of the trainer"
    )
    where = _Place(rollouts, size, row, token, scored.batch)
    if isinstance(parts.loop.sampler, SGLangSampler):
        _servers_layers(parts.loop, parts.loop.sampler, where, folder, verdict)
    else:
        wave, place = same_wave(rollouts, size, row, parts.loop.recipe.rollout.max_running)
        _compare(parts.loop, where, cached_layers(parts.loop.policy, wave, size, place, token.position), verdict)
    if verdict.weights:
        more = f" and {len(verdict.weights) - 1} more" if len(verdict.weights) > 1 else ""
        say(f"first differing weight: the servers hold another {verdict.weights[0]} than the trainer{more}")
    elif verdict.layer is not None:
        say(f"first diverging layer: {verdict.layer}")
    if verdict.note:
        say(verdict.note)


@dataclass(frozen=True)
class _Place:
    """The diverging token: `row` of the rollouts that were sampled together, in groups of `size`."""

    rollouts: list[Rollout]
    size: int
    row: int
    token: Token
    batch: PackedBatch


def _servers_layers(loop: EMLoop, sampler: SGLangSampler, where: _Place, folder: Path, verdict: Verdict) -> None:
    """First the weights, which name the layer at once; if they are the same, a server that dumps what it computes."""
    names = differing_weights(sampler, loop.policy)
    if names:
        verdict.weights = names
        return
    sampler.close()  # its GPU memory is needed
    rollout = where.rollouts[where.row]
    response = rollout.response_ids[: where.token.position]
    try:
        found = server_layers(sampler, loop.policy, rollout.prompt.token_ids, response, folder / "dump")
    except (UserError, Halted, RuntimeError) as error:
        verdict.note = f"layers could not be compared: {error}"
        return
    _compare(loop, where, found, verdict)


def _compare(loop: EMLoop, where: _Place, theirs: Outputs, verdict: Verdict) -> None:
    num_positions = len(where.rollouts[where.row].prompt.token_ids) + where.token.position
    ours = trainer_layers(loop.policy, where.batch, where.token.row, num_positions, loop.recipe.micro_batch_tokens)
    verdict.layers = compare_layers(loop.policy, ours, theirs)
    verdict.layer = first_diverging_layer(verdict.layers, verdict.tolerance)
    if not verdict.layers:
        verdict.note = "layers could not be compared: no module of the sampler goes by a name that the trainer's has"
    elif verdict.layer is None:
        worst = max(verdict.layers, key=lambda layer: layer.difference)
        verdict.note = (
            f"computed again, no layer differs by more than {verdict.tolerance.layer:g} (largest: {worst}): the difference arises "
            "after the last one, or only beside other sequences"
        )
