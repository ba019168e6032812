"""The model card of an export: what the models are, how they were trained, what they are worth, and what exactly they are."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from tempo_em.loading import yaml_word
from tempo_em.presets import PRESETS
from tempo_em.report.runs import Run, is_aside, number, read_run

CARD = "README.md"
FRONT = """---
library_name: transformers
pipeline_tag: text-generation
tags: [tempo, tempo-engine, test-time-training, reinforcement-learning]
---
"""
CALIBRATION = {
    "auroc": "AUROC", "auroc_within_prompt": "AUROC within a question", "brier": "Brier score", "ece": "calibration error (ECE)",
    "value_mean": "mean promise", "overvaluation": "over-valuation",
}  # fmt: skip
METRICS = ("mean@", "maj@", "pass@")


def write_card(run_dir: Path, target: Path, step: int) -> Path:
    """Write `target`/README.md on the models there, which are those of the run's checkpoint of this step."""
    file = target / CARD
    file.write_bytes(card(read_run(run_dir), step, hashes(target)).encode("utf-8", "replace"))
    return file


def card(run: Run, step: int, digests: Mapping[str, str]) -> str:
    """Markdown. `digests`: SHA-256 of each file by its path in the export."""
    parts = [FRONT, *_what(run, step, digests), *_evaluation(run, step), *_recipe(run), *_hashes(digests)]
    return "\n".join(parts) + "\n"


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file but the card, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / CARD)
    found = {}
    for path in files:
        with path.open("rb") as file:
            found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _what(run: Run, step: int, digests: Mapping[str, str]) -> Iterator[str]:
    method = run.method
    description = PRESETS[method][0] if method in PRESETS else "a method of another version of tempo-engine"
    has_critic = any(name.startswith("critic/") for name in digests)
    yield f"# A policy{' and its critic' if has_critic else ''}, trained by tempo-engine with {_cell(method)}\n"
    yield (
        f"Method `{_cell(method)}`: {description}. The models are those after step {step} of the run, "
        f"whose seed was {_cell(run.recipe.get('seed'))}.\n"
    )
    yield '- `policy/`: the language model, `AutoModelForCausalLM.from_pretrained(REPOSITORY, subfolder="policy")`'
    if has_critic:
        outcome = (
            "from -1 (wrong) to 1 (right)"
            if run.recipe.get("critic.target") == "plus_minus_one"
            else "as a probability"
        )
        yield (
            f"- `critic/`: V(x, y_<t), whether a response will end right, {outcome}, "
            "read before each of its tokens and after the last: token classification with one label, "
            "or a trunk with `value_head.safetensors`"
        )
    yield (
        "\nTrained at test time by an EM scheme (TEMPO, [arXiv 2604.19295](https://arxiv.org/abs/2604.19295)) or a baseline of it: "
        "the policy has learned on the very questions that it is evaluated on as `unlabelled`, without their answers. What it is "
        "worth on other questions is what the held-out sets say.\n"
    )


def _evaluation(run: Run, step: int) -> Iterator[str]:
    """Tables of the newest evaluation that this step can have had, beside those of the base and of the loop's start."""
    known = [(f"after iteration {i}" if i else "start", row) for i, row in run.evaluations]
    known = [(label, row) for label, row in known if (number(row.get("step")) or 0) <= step]
    columns = [*([("base", run.base)] if run.base else []), *known[:1], *(known[-1:] if len(known) > 1 else [])]
    sets = [name for name in run.sets if any(f"/{name}/" in metric for _, row in columns for metric in row)]
    yield "## Evaluation\n"
    if not sets:
        yield "These models were not evaluated.\n"
        return
    heading = ["set", "metric", *(label for label, _ in columns)]
    names = dict.fromkeys(name for _, row in columns for name in row)
    core = [
        (set_name, metric, name)
        for set_name in sets
        for name in names
        if (metric := name.removeprefix(f"val-core/{set_name}/acc/")) != name and metric.startswith(METRICS)
    ]
    yield from _table(heading, [[s, metric, *_values(columns, name)] for s, metric, name in core])
    critic = [
        (set_name, label, name)
        for set_name in sets
        for metric, label in CALIBRATION.items()
        if (name := f"val-aux/{set_name}/critic/{metric}") in names
    ]
    if critic:
        yield "\n### The critic's calibration\n"
        yield "Its value after the last token as a probability; over-valuation is what it promises beyond what is right.\n"
        yield from _table(heading, [[s, label, *_values(columns, name)] for s, label, name in critic])
    yield ""


def _values(columns: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> list[str]:
    values = [number(row.get(name)) for _, row in columns]
    return ["" if value is None else f"{value:.3f}" for value in values]


def _recipe(run: Run) -> Iterator[str]:
    """What determines the result. Paths are of one machine: only their last part is told."""
    lines = [
        f"{s.path}: {yaml_word(_without_folders(s.value))}  # {s.origin}"
        for s in run.settings if not is_aside(s.path)
    ]  # fmt: skip
    fence = "`" * max(3, 1 + max((len(ticks) for line in lines for ticks in re.findall("`+", line)), default=0))
    yield f"## Recipe\n\n{fence}yaml"
    yield from lines
    yield f"{fence}\n"


def _without_folders(value: Any) -> Any:
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return [_without_folders(item) for item in value] if isinstance(value, list) else value


def _hashes(digests: Mapping[str, str]) -> Iterator[str]:
    yield "## Files\n"
    yield from _table(["file", "SHA-256"], [[name, f"`{digest}`"] for name, digest in digests.items()], raw=True)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, raw: bool = False) -> Iterator[str]:
    yield f"| {' | '.join(heading)} |"
    yield f"| {' | '.join('---' for _ in heading)} |"
    for row in rows:
        yield f"| {' | '.join(row if raw else map(_cell, row))} |"


def _cell(value: Any) -> str:
    """Text that cannot end a table's cell, a span of code or a line, nor become markup."""
    return re.sub(r"[|`<>\[\]\\\s]+", " ", str(value)).strip()
