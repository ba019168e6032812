"""The page: what is on it, in which order, and its HTML."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from tempo_em.loading import yaml_word
from tempo_em.report import charts, reading, timing
from tempo_em.report.panels import Compared, Panel, Panels
from tempo_em.report.runs import SEEDS, Run, groups, is_aside, names_of, number
from tempo_em.report.verdict import measures, sentence, sentence_of_many

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MISMATCH = (
    ("rollout/mismatch_kl", "KL, nats a token"),
    ("rollout/logprob_diff_mean", "mean log-prob difference"),
    ("rollout/logprob_diff_max", "largest log-prob difference"),
    ("rollout/ess_token", "share of the sample size lost, tokens"),
    ("rollout/ess_sequence", "share of the sample size lost, sequences"),
    ("rollout/outside_band", "share of tokens outside the band"),
)
# Controls that HTML does not allow, and those that reorder text, as a visible mark.
UNWRITABLE = {c: 0xFFFD for c in [*range(32), 127, *range(128, 160), 0xFFFE, 0xFFFF] if c not in (9, 10)}
UNWRITABLE |= dict.fromkeys([*range(8234, 8239), *range(8294, 8298)], 65533)


@dataclass(frozen=True)
class Section:
    """A heading and its charts."""

    key: str
    title: str
    lead: str
    panels: list[Panel]


def render(runs: Sequence[Run], *, refresh: int | None = None) -> bytes:
    """The page of these runs as UTF-8. `refresh`: seconds after which it loads itself again."""
    page = resources.files("tempo_em.report") / "page"
    style, script = (Markup((page / name).read_text(encoding="utf-8")) for name in ("style.css", "script.js"))
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["yaml"] = yaml_word
    template = environment.from_string((page / "report.html").read_text(encoding="utf-8"))
    html = template.render(
        style=style, script=script, policy=_content_policy(style, script), refresh=refresh, **context(list(runs))
    )
    return html.translate(UNWRITABLE).encode("utf-8", "replace")


def _content_policy(style: str, script: str) -> str:
    """Nothing is loaded from anywhere, and of styles and scripts only these two are run, by their hashes."""
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; style-src 'sha256-{digests[0]}'; script-src 'sha256-{digests[1]}'; base-uri 'none'; "
        "form-action 'none'"
    )


def context(runs: list[Run]) -> dict[str, Any]:
    """Everything that the template shows."""
    together = groups(runs)
    names = names_of(together)
    compared = [
        Compared(LETTERS[i] if i < len(LETTERS) else str(i + 1), name, group)
        for i, (name, group) in enumerate(zip(names, together, strict=True))
    ]
    panels = Panels(compared)
    found = [measures(group) for group in together]
    is_one = len(compared) == 1
    return {
        "title": names[0] if is_one else f"{len(compared)} recipes",
        "verdict": sentence(together[0], names[0]) if is_one else sentence_of_many(names, found),
        "is_one": is_one,
        "groups": [
            {"key": g.key, "name": g.name, "measures": m, "by_name": {one.name: one for one in m},
             "sentence": sentence(g.runs, g.name), "count": len(g.runs)}
            for g, m in zip(compared, found, strict=True)
        ],
        "runs": runs,
        "unfinished": [run for run in runs if not run.is_finished],
        "sections": sections(panels),
        "samples": [(g, reading.pairs(g.runs[0], f"sample-{g.key}")) for g in compared[:6]],
        "levels": range(reading.LEVELS + 1),
        "times": [_times(g) for g in compared],
        "mismatches": [(g, _mismatches(g.runs)) for g in compared],
        "differing": differing([group[0] for group in together]),
        "recipes": [(g, g.runs[0].settings) for g in compared],
        "styles": charts.STYLES,
    }  # fmt: skip


def sections(panels: Panels) -> list[Section]:
    """Those that have a chart."""
    band = "Bands span the lowest and highest of the seeds." if any(len(g.runs) > 1 for g in panels.groups) else ""
    found = [
        Section("accuracy", "Accuracy", band, panels.accuracy()),
        Section("diversity", "Diversity", "Whether the samples of a question still differ.", panels.diversity()),
        Section("critic", "The critic", "How well its value after the last token tells right from wrong responses.",
                [*panels.critic(), *panels.reliability()]),
        Section("signs", "Without hidden answers", "What every iteration shows; stretches with an alarm are shaded.",
                panels.signs()),
        Section("speed", "Speed", "", panels.speed()),
        Section("mismatch", "Sampler and trainer", "How far their log-probs of the same tokens are apart.", panels.mismatch()),
    ]  # fmt: skip
    return [section for section in found if section.panels]


def _times(group: Compared) -> dict[str, Any]:
    """Of the recipe's first run: its seconds in total and iteration by iteration."""
    run = group.runs[0]
    total = timing.totals(run)
    phases, bars = timing.bars(run)
    seconds = sum(value for *_, value in total)
    key = f"time-{group.key}"
    return {
        "group": group,
        "total": timing.duration(seconds),
        "parts": [(name, style, timing.duration(value), value / (seconds or 1.0)) for name, style, value in total],
        "share": charts.share_bar(f"{key}-share", "Seconds of the whole run", total) if total else None,
        "bars": charts.stacked_bars(f"{key}-bars", "Seconds of each iteration", phases, bars)
        if any(sum(each) for _, each in bars)
        else None,
        "phases": phases,
    }


def _mismatches(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    """(what, median, largest, smallest) over all iterations, of what was measured."""
    rows = []
    for metric, name in MISMATCH:
        found = [v for run in runs for row in run.iterations if (v := number(row.get(metric))) is not None]
        values = sorted(1 - v if "/ess_" in metric else v for v in found)
        if values:
            rows.append((name, *(f"{v:.3g}" for v in (values[len(values) // 2], values[-1], values[0]))))
    return rows


def differing(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(dotted path, each recipe's value) of the settings in which recipes differ."""
    recipes = [run.recipe for run in runs]
    paths = dict.fromkeys(path for recipe in recipes for path in recipe)
    rows = [(path, [yaml_word(r[path]) if path in r else "" for r in recipes]) for path in paths]
    return [
        (path, values) for path, values in rows if len(set(values)) > 1 and path not in SEEDS and not is_aside(path)
    ]
