"""Where a run's seconds went."""

from collections import defaultdict
from collections.abc import Sequence

from tempo_em.report.runs import Row, Run, number

# In the order of an iteration; others follow as they come.
PHASES = ("rollout", "old_logprob", "values", "e_step", "m_step", "checkpoint")
NAMES = {
    "rollout": "sampling", "old_logprob": "old log-probs", "values": "critic's values", "e_step": "E-step", "m_step": "M-step",
    "checkpoint": "checkpoints", "evaluation": "evaluation", "cold_start": "cold start", "critic_warmup": "critic warm-up",
    "rlvr": "RLVR", "idle": "idle and unaccounted",
}  # fmt: skip
# Each phase keeps its colour; those that no list here knows share one.
STYLES = ("rollout", "old_logprob", "values", "e_step", "m_step", "checkpoint", "evaluation", "idle", "cold_start")
MOST_BARS = 60


def phases_of(rows: Sequence[Row]) -> list[str]:
    """Phases that the EM loop's iterations name, and `idle` for what is left of a step."""
    prefix = "timing_s/"
    seen = {name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix)} - {"step"}
    return [*(p for p in PHASES if p in seen), *sorted(seen - set(PHASES)), "idle"]


def seconds_of(row: Row, phases: Sequence[str]) -> list[float]:
    """Seconds of each phase in an iteration; what its step took longer than all of them is idle."""
    each = [number(row.get(f"timing_s/{phase}")) or 0.0 for phase in phases if phase != "idle"]
    return [*each, max((number(row.get("timing_s/step")) or 0.0) - sum(each), 0.0)]


def style_of(phase: str) -> int:
    return STYLES.index(phase) if phase in STYLES else len(STYLES)


def bars(run: Run) -> tuple[list[tuple[str, int]], list[tuple[float, list[float]]]]:
    """(name, style) of the phases, and (iteration, seconds of each) of the EM loop; many iterations as means of neighbours."""
    phases = phases_of(run.iterations)
    step = max(1, -(-len(run.iterations) // MOST_BARS))
    found = []
    for i in range(0, len(run.iterations), step):
        rows = run.iterations[i : i + step]
        each = [seconds_of(row, phases) for row in rows]
        means = [sum(values) / len(rows) for values in zip(*each, strict=True)]
        found.append((number(rows[-1].get("iteration")) or 0.0, means))
    return [(NAMES.get(phase, phase), style_of(phase)) for phase in phases], found


def totals(run: Run) -> list[tuple[str, int, float]]:
    """(phase, style, seconds) of the whole run, earlier stages and evaluations included; phases that took no time are left out."""
    phases = phases_of(run.iterations)
    found: dict[str, float] = defaultdict(float)
    for row in run.stages:
        found[str(row["stage"])] += number(row.get("timing_s/step")) or 0.0
    for row in run.iterations:
        for phase, seconds in zip(phases, seconds_of(row, phases), strict=True):
            found[phase] += seconds
    rows = [row for _, row in run.evaluations] + ([run.base] if run.base else [])
    timed = [number(row.get("timing_s/evaluation")) for row in rows]
    # Older runs timed evaluations in their summary only.
    found["evaluation"] = sum(s for s in timed if s) or number(run.seconds.get("evaluation")) or 0.0
    found["checkpoint"] = max(found["checkpoint"], number(run.seconds.get("checkpoint")) or 0.0)
    return [(NAMES.get(phase, phase), style_of(phase), seconds) for phase, seconds in found.items() if seconds > 0]


def duration(seconds: float) -> str:
    """4.2 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
