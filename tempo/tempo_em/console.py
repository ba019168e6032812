"""What a person sees of a run: a live line on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

STAGE_TITLES = {"cold_start": "cold start", "critic_warmup": "critic warm-up", "rlvr": "RLVR", "em": "EM"}
SECONDS_BETWEEN_LINES = 10.0


class Display(Protocol):
    """Told about everything worth seeing."""

    def begin(self, stage: str, done: int, total: int) -> None: ...
    def phase(self, name: str) -> None: ...
    def advance(self, stage: str, iteration: int, metrics: Mapping[str, float]) -> None: ...
    def note(self, text: str) -> None: ...
    def close(self) -> None: ...


def headline(metrics: Mapping[str, float]) -> str:
    """The few numbers of an iteration that tell how it goes."""
    wanted = (
        ("sft/loss", "loss", ".3f"),
        ("critic/score/mean", "labelled accuracy", ".2f"),
        ("critic/rewards/mean", "reward", ".2f"),
        ("critic/auroc_fresh", "critic AUROC", ".2f"),
        ("actor/entropy", "entropy", ".2f"),
        ("perf/throughput", "tok/s", ".0f"),
    )
    return "  ".join(f"{label} {metrics[name]:{form}}" for name, label, form in wanted if name in metrics)


class LiveDisplay:
    """A progress bar with the phase, rates and the last evaluation."""

    def __init__(self, console: Console) -> None:
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description:15}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[phase]}", style="magenta"),
            TextColumn("{task.fields[headline]}", style="cyan"),
        )
        self.progress = Progress(*columns, console=console)
        self.task = None

    def begin(self, stage: str, done: int, total: int) -> None:
        self.progress.start()
        self.task = self.progress.add_task(STAGE_TITLES[stage], total=total, completed=done, headline="", phase="")

    def phase(self, name: str) -> None:
        if self.task is not None and not name.startswith("stage/"):
            self.progress.update(self.task, phase=name.replace("_", "-"))

    def advance(self, stage: str, iteration: int, metrics: Mapping[str, float]) -> None:
        if self.task is not None:
            self.progress.update(self.task, advance=1, headline=headline(metrics))

    def note(self, text: str) -> None:
        self.progress.console.print(text)

    def close(self) -> None:
        self.progress.stop()


class PlainDisplay:
    """One line now and then: the first and last iteration of a stage, and otherwise every few seconds."""

    def __init__(self) -> None:
        self.total = 0
        self._last = 0.0

    def begin(self, stage: str, done: int, total: int) -> None:
        self.total = total
        self._last = 0.0

    def phase(self, name: str) -> None:
        pass

    def advance(self, stage: str, iteration: int, metrics: Mapping[str, float]) -> None:
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES or iteration + 1 == self.total:
            self._last = time.monotonic()
            self.note(f"{STAGE_TITLES[stage]} {iteration + 1}/{self.total}  {headline(metrics)}")

    def note(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class Silence:
    """For ranks that do not speak."""

    def begin(self, stage: str, done: int, total: int) -> None:
        pass

    def phase(self, name: str) -> None:
        pass

    def advance(self, stage: str, iteration: int, metrics: Mapping[str, float]) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


def make_display() -> Display:
    console = Console()
    return LiveDisplay(console) if console.is_terminal else PlainDisplay()


def evaluation_line(label: str, results: Mapping[str, Mapping[str, float]]) -> str:
    """One line an evaluation: accuracy and diversity per set, and the critic where there is one."""
    parts = []
    for name, metrics in results.items():
        shown = [
            (k, v) for k, v in metrics.items() if k.startswith(("mean@", "maj@")) or k in ("pass@8", "critic/auroc")
        ]
        parts.append(f"{name}: " + " ".join(f"{k.removeprefix('critic/')} {v:.3f}" for k, v in shown))
    return f"evaluation {label}  " + "  |  ".join(parts)


def summary_table(stages: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """Base, start of the EM loop and final, side by side, for every set."""
    table = Table(title="accuracy, diversity and the critic's calibration", title_justify="left")
    table.add_column("set")
    table.add_column("metric")
    for stage in stages:
        table.add_column(stage, justify="right")
    last = list(stages.values())[-1]
    for set_name, metrics in last.items():
        for metric in metrics:
            if metric.startswith(
                ("mean@", "pass@8", "maj@", "distinct", "critic/auroc", "critic/brier", "critic/ece", "critic/over")
            ):
                values = [stage.get(set_name, {}).get(metric) for stage in stages.values()]
                table.add_row(set_name, metric, *("" if v is None else f"{v:.3f}" for v in values))
        table.add_section()
    return table
