"""When the critic is recalibrated, and when the policy waits for it: decided by how it judges responses that it has never met."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tempo_engine.model import Policy
from tempo_engine.packing import pack
from tempo_engine.rollout import Rollout
from tempo_kernels.segments import segment_lengths

from tempo_em.recipe import EStepRecipe, GateRecipe
from tempo_em.transfer import spread

AUROC, BRIER, KL = "critic/auroc_fresh", "critic/brier_fresh", "critic/kl_since_e_step"


@dataclass(frozen=True)
class Decision:
    """What to do in an iteration, what was measured for it, and what a person should hear."""

    recalibrates: bool
    waits: bool
    metrics: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass
class Cadence:
    """`since`: iterations since the last E-step (None: there was none yet). `reference`: the first look after it. `anchor`: some of
    its responses, with their log-probs under the policy of that time."""

    estep: EStepRecipe
    gate: GateRecipe
    since: int | None = None
    reference: dict[str, float] = field(default_factory=dict)
    waits: bool = False
    anchor: list[Rollout] = field(default_factory=list)

    def decide(self, fresh: dict[str, float]) -> Decision:
        """One iteration further. `fresh`: the critic's AUROC and Brier score on fresh labelled responses, and the KL. NaN, or
        nothing, decides nothing."""
        self.since = None if self.since is None else self.since + 1
        waited, self.waits = self.waits, self._is_worse_than_the_gate(fresh)
        is_due = self.since is None or self.since >= self.estep.every or self.waits
        reasons = self._reasons(fresh)
        notes = [] if is_due or not reasons else [f"recalibrating after {self.since} iterations: {'; '.join(reasons)}"]
        if self.waits != waited:
            measured = f"{AUROC} is {fresh.get(AUROC, math.nan):.3f}, {BRIER} {fresh.get(BRIER, math.nan):.3f}"
            said = "the policy waits until the critic is better" if self.waits else "the policy goes on"
            notes.append(f"{said}: {measured}; mstep.gate wants {_wanted(self.gate)}")
        for name, value in fresh.items():
            if not math.isnan(value):
                self.reference.setdefault(name, value)
        metrics = fresh | {"actor/waits": float(self.waits)}
        if is_due or reasons:
            self.since, self.reference = 0, {}
        return Decision(is_due or bool(reasons), self.waits, metrics, tuple(notes))

    def _reasons(self, fresh: dict[str, float]) -> list[str]:
        """Why the critic should not be trusted any longer. Comparisons with NaN are false."""
        how, nan = self.estep.adaptive, math.nan
        auroc, brier, kl = (fresh.get(name, nan) for name in (AUROC, BRIER, KL))
        best, lowest = self.reference.get(AUROC, nan), self.reference.get(BRIER, nan)
        found = []
        if how.auroc_band is not None and auroc < best - how.auroc_band:
            found.append(f"{AUROC} fell from {best:.3f} to {auroc:.3f}")
        if how.brier_band is not None and brier > lowest + how.brier_band:
            found.append(f"{BRIER} rose from {lowest:.3f} to {brier:.3f}")
        if how.kl_budget is not None and kl > how.kl_budget:
            found.append(f"{KL} is {kl:.3g}")
        return found

    def _is_worse_than_the_gate(self, fresh: dict[str, float]) -> bool:
        """What cannot be measured, because all responses are right or all wrong, leaves things as they are."""
        bounds = ((self.gate.auroc_below, AUROC, -1), (self.gate.brier_above, BRIER, 1))
        known = [(sign * fresh.get(name, math.nan), sign * bound) for bound, name, sign in bounds if bound is not None]
        if any(math.isnan(value) for value, _ in known):
            return self.waits
        return any(value > bound for value, bound in known)

    # --- How far the policy has moved ---

    def drop_anchor(self, policy: Policy, labelled: Sequence[Rollout], max_tokens: int) -> None:
        """Remember what the policy thinks of some responses at this E-step."""
        if self.estep.adaptive.kl_budget is None or not labelled:
            return
        some = spread(labelled, self.estep.adaptive.kl_responses)
        batch = pack(some, policy.device)
        logprobs = policy.token_logprobs(batch, max_tokens).split(segment_lengths(batch.cu_responses_S1).tolist())
        self.anchor = [replace(r, logprobs=x.tolist()) for r, x in zip(some, logprobs, strict=True)]

    def drift(self, policy: Policy, max_tokens: int) -> dict[str, float]:
        """KL(policy at the last E-step || policy now) of whole responses, in nats: the mean over the anchor's responses of
        the sum over tokens of rho - 1 - log rho, rho = pi_now / pi_then, which is never negative."""
        if not self.anchor:
            return {}
        batch = pack(self.anchor, policy.device)
        log_rho_T = (policy.token_logprobs(batch, max_tokens) - batch.sampler_logprob_T).double().clamp(max=20.0)
        return {KL: float((torch.expm1(log_rho_T) - log_rho_T).sum()) / len(batch)}

    # --- Between runs ---

    def state(self) -> dict[str, Any]:
        """Everything needed to go on exactly, as JSON."""
        anchor = [rollout.to_json() for rollout in self.anchor]
        return {"since": self.since, "reference": self.reference, "waits": self.waits, "anchor": anchor}

    def load_state(self, state: dict[str, Any]) -> None:
        self.since, self.reference, self.waits = state["since"], dict(state["reference"]), state["waits"]
        self.anchor = [Rollout.from_json(rollout) for rollout in state["anchor"]]


def _wanted(gate: GateRecipe) -> str:
    parts = [] if gate.auroc_below is None else [f"an AUROC of {gate.auroc_below:g}"]
    parts += [] if gate.brier_above is None else [f"a Brier score of {gate.brier_above:g}"]
    return " and ".join(parts)
