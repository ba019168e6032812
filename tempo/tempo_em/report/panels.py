"""The curves of a page: which metrics, of which sets or recipes, as small multiples."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tempo_em.report.charts import Axis, line_chart, reliability_chart
from tempo_em.report.runs import Run, number
from tempo_em.report.series import Curve, Points, accuracy_metric, evaluated, iterated, over_seeds, pass_ks, ratio
from tempo_em.report.verdict import alarm_stretches

SHARE, PLAIN = Axis(is_share=True), Axis()
TRAINED = ("tokens/trained_policy", "tokens/trained_critic")
UPDATES = ("timing_s/m_step", "timing_s/e_step")


@dataclass(frozen=True)
class Panel:
    """One small chart, what it says in words, and its numbers: (name, [(x, y)])."""

    title: str
    note: str
    svg: Markup
    curves: Sequence[Curve]


@dataclass(frozen=True)
class Compared:
    """Runs of one recipe on a page: `key` is the letter they go by where there are several."""

    key: str
    name: str
    runs: list[Run]


class Panels:
    """Draws panels for one recipe (a curve for each evaluation set) or several (a curve for each recipe, on the main set)."""

    def __init__(self, groups: Sequence[Compared]) -> None:
        self.groups = groups
        self.is_one = len(groups) == 1
        self.sets = groups[0].runs[0].sets or next((g.runs[0].sets for g in groups if g.runs[0].sets), [])
        self.main = self.sets[0] if self.sets else ""
        self.drawn = 0

    def draw(
        self, title: str, note: str, curves: Sequence[Curve], axis: Axis, **more: Sequence[tuple[float, float]]
    ) -> list[Panel]:
        """The panel, or nothing where nothing was measured."""
        self.drawn += 1
        svg = line_chart(f"chart{self.drawn}", title, curves, axis, **more)
        return [Panel(title, note, svg, [c for c in curves if c.points])] if svg else []

    def by_group(self, read: Callable[[Run], Points], name: str | None = None) -> list[Curve]:
        """One curve a recipe; `name`: what it is called where there is only one."""
        if self.is_one:
            group = self.groups[0]
            return [over_seeds(name or group.name, [read(run) for run in group.runs])]
        return [
            over_seeds(group.name, [read(run) for run in group.runs], style, group.key)
            for style, group in enumerate(self.groups)
        ]

    def by_set(self, metric: Callable[[Run, str], str | None]) -> list[Curve]:
        def read(set_name: str) -> Callable[[Run], Points]:
            return lambda run: evaluated(run, metric(run, set_name) or "")

        if not self.is_one:
            return self.by_group(read(self.main))
        runs = self.groups[0].runs
        return [over_seeds(name, [read(name)(run) for run in runs], i) for i, name in enumerate(self.sets)]

    def accuracy(self) -> list[Panel]:
        """Of the policy: mean, pass@k, majority."""
        first = self.groups[0].runs[0]
        where = "" if self.is_one else f", {self.main}"
        found = self.draw(f"Accuracy{where}", "share of right responses", self.by_set(accuracy_metric), SHARE)
        if self.is_one:
            curves = [
                over_seeds(
                    f"pass@{k}", [evaluated(run, f"val-core/{self.main}/acc/pass@{k}") for run in self.groups[0].runs],
                    0 if k == 8 else 1 + i,
                )
                for i, k in enumerate(pass_ks(first, self.main))
            ]  # fmt: skip
            return (
                found
                + self.draw(f"pass@k, {self.main}", "at least one of k samples is right", curves, SHARE)
                + (self.majority())
            )
        for name in self.sets[1:]:
            curves = self.by_group(lambda run, name=name: evaluated(run, accuracy_metric(run, name) or ""))
            found += self.draw(f"Accuracy, {name}", "share of right responses", curves, SHARE)
        curves = self.by_group(lambda run: evaluated(run, f"val-core/{self.main}/acc/pass@8"))
        found += self.draw(f"pass@8{where}", "at least one of 8 samples is right", curves, SHARE)
        return found + self.majority()

    def majority(self) -> list[Panel]:
        curves = self.by_set(lambda run, name: accuracy_metric(run, name, "maj@"))
        return self.draw("Majority vote", "the most frequent answer is right", curves, SHARE)

    def diversity(self) -> list[Panel]:
        """How different the samples of a question still are."""
        return [
            *self.draw(
                "Distinct answers", "different ones among a question's samples", self.aux("distinct_answers"), PLAIN
            ),
            *self.draw("Entropy", "nats a token, of the sampled tokens", self.aux("entropy"), PLAIN),
            *self.draw("Response length", "tokens", self.aux("response_length/mean"), PLAIN),
        ]

    def critic(self) -> list[Panel]:
        """How well the critic's terminal values tell right from wrong, and how honest they are."""
        honest = Axis(is_share=True, low=0.0, high=0.0, bound=(0.0, "honest"))
        return [
            *self.draw("AUROC", "a right response scores above a wrong one", self.aux("critic/auroc"), Axis(high=1.0)),
            *self.draw("Brier score", "lower is better", self.aux("critic/brier"), Axis(low=0.0)),
            *self.draw("Calibration error", "ECE over ten bins", self.aux("critic/ece"), Axis(low=0.0)),
            *self.draw("Over-valuation", "promised less right", self.aux("critic/overvaluation"), honest),
        ]

    def aux(self, metric: str) -> list[Curve]:
        return self.by_set(lambda run, name: f"val-aux/{name}/{metric}")

    def signs(self) -> list[Panel]:
        """What every iteration shows without any hidden answer, alarms shaded."""
        on = {
            alarm: [(float(a), float(b)) for a, b in stretches]
            for alarm, stretches in (alarm_stretches(self.groups[0].runs[0]) if self.is_one else {}).items()
        }
        accuracy = self.by_group(lambda run: iterated(run, "critic/score/mean"), "labelled, right")
        promise = self.by_group(promised, "promised")
        if self.is_one:
            promise = [Curve("promised", promise[0].points, promise[0].band, 1)]
            both = self.draw(
                "Verified and promised", "labelled responses that are right; outcomes given to unlabelled ones",
                [*accuracy, *promise], SHARE, shaded=[*on.get("accuracy", []), *on.get("promise", [])],
            )  # fmt: skip
        else:
            both = self.draw("Labelled accuracy", "verified responses that are right", accuracy, SHARE)
            both += self.draw("Promised", "outcomes given to unlabelled responses", promise, SHARE)
        fresh = self.by_group(lambda run: iterated(run, "critic/auroc_fresh"), "fresh AUROC")
        kept = self.by_group(lambda run: iterated(run, transfer_gap), "gap")
        entropy = self.by_group(lambda run: iterated(run, "actor/entropy"), "entropy")
        norm = self.by_group(lambda run: iterated(run, "actor/grad_norm"), "policy")
        return [
            *both,
            *self.draw("Critic on fresh labels", "AUROC before it is fitted to them", fresh, Axis(high=1.0),
                       shaded=on.get("auroc", [])),
            *self.draw("Transfer", "how much less an E-step keeps of the judgement of unlabelled responses", kept, Axis(low=0.0),
                       shaded=on.get("transfer", [])),
            *self.draw("Entropy in training", "nats a token", entropy, PLAIN),
            *self.draw("Gradient norm", "of the policy, before clipping", norm, Axis(low=0.0)),
        ]  # fmt: skip

    def speed(self) -> list[Panel]:
        sampled = self.by_group(
            lambda run: iterated(run, lambda row: ratio(row, ["tokens/generated"], ["timing_s/rollout"])), "sampled"
        )
        trained = self.by_group(lambda run: iterated(run, lambda row: ratio(row, TRAINED, UPDATES)), "trained")
        low = Axis(low=0.0)
        return [
            *self.draw("Sampled tokens a second", "while sampling", sampled, low),
            *self.draw("Trained tokens a second", "in E- and M-steps", trained, low),
        ]

    def mismatch(self) -> list[Panel]:
        """How far the sampler's log-probs are from the trainer's."""
        bounds = [number(run.recipe.get("rollout.mismatch.warn_above")) for g in self.groups for run in g.runs]
        bound = (bounds[0], "warns above") if bounds and bounds[0] is not None else None
        kl = self.by_group(lambda run: iterated(run, "rollout/mismatch_kl"), "mean KL")
        worst = self.by_group(lambda run: iterated(run, "rollout/logprob_diff_max"), "largest")
        lost = self.by_group(lambda run: {i: 1 - v for i, v in iterated(run, "rollout/ess_sequence").items()}, "lost")
        return [
            *self.draw("KL of sampler and trainer", "nats a token", kl, Axis(is_log=True, bound=bound)),
            *self.draw("Largest log-prob difference", "of any token", worst, Axis(is_log=True)),
            *self.draw("Sample size lost", "share, to uneven weights of sequences", lost, Axis(is_log=True)),
        ]

    def reliability(self) -> list[Panel]:
        """For each recipe (its first run): what the critic promised at the start and in the end, against what was right."""
        panels = []
        for group in self.groups:
            run = group.runs[0]
            points = [(i, bins) for i, row in run.evaluations if (bins := _bins(row, self.main))]
            if not points:
                continue
            ends = [points[-1], *points[:1]] if len(points) > 1 else points
            curves = [
                ("start" if i == 0 else f"iteration {i}", bins, style)
                for style, (i, bins) in zip(("s0", "then"), ends, strict=False)
            ]
            self.drawn += 1
            title = f"Reliability, {self.main}" + ("" if self.is_one else f", {group.key}")
            svg = reliability_chart(f"chart{self.drawn}", title, curves)
            note = "share right against promised; on the diagonal promises are kept"
            panels.append(
                Panel(title, note, svg, [Curve(n, [(p, r) for _, p, r in bins], []) for n, bins, _ in curves])
            )
        return panels


def promised(run: Run) -> Points:
    """Mean outcome of unlabelled responses as a probability."""
    is_signed = run.recipe.get("critic.target") == "plus_minus_one"
    return {i: (v + 1) / 2 if is_signed else v for i, v in iterated(run, "critic/rewards/unlabelled").items()}


def transfer_gap(row: Mapping[str, object]) -> float | None:
    """How much more an E-step kept of the critic's judgement of labelled responses than of unlabelled ones."""
    labelled, unlabelled = (number(row.get(f"critic/kept_{kind}")) for kind in ("labelled", "unlabelled"))
    return None if labelled is None or unlabelled is None else labelled - unlabelled


def _bins(row: Mapping[str, object], set_name: str) -> list[tuple[float, float, float]]:
    found = row.get("reliability")
    bins = found.get(set_name) if isinstance(found, dict) else None
    rows = [[number(v) for v in b] for b in bins if isinstance(b, list)] if isinstance(bins, list) else []
    return [(n, p, r) for n, p, r in (b for b in rows if len(b) == 3) if None not in (n, p, r)]  # pyright: ignore[reportReturnType]
