"""The rows of the throughput benchmark: for a terminal, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from tempo_kernels.bench.report import commit, device_name

from tempo_em.throughput.measure import Row

MIB = 2**20


def table(rows: Sequence[Row]) -> Table:
    """More is better, of ratios too; of memory less is."""
    unit = rows[0].unit if rows else "tokens per CPU-second"
    result = Table(title=f"whole RL steps: response tokens trained on, {unit}; more is better, of memory less")
    for heading in (
        "case",
        "peer",
        "ours",
        "theirs",
        "ratio",
        "target",
        "seconds a step",
        "MiB",
        "peer's",
        "error",
        "note",
    ):
        is_text = heading in ("case", "peer", "note")
        result.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        result.add_row(
            f"{row.case} {row.dtype}", row.peer, _speed(row, row.ours, 0), _speed(row, row.theirs, 1),
            _coloured(row.ratio, row.target), _number(row.target),
            " / ".join(f"{x:.3g}" for x in row.wall) or "-", _mib(row.peak_bytes),
            _coloured_memory(row), _number(max(row.error.values(), default=None), ".1e"),
            row.note if row.checked else f"[red]{row.note}",
        )  # fmt: skip
    return result


def _speed(row: Row, speed: float | None, place: int) -> str:
    if speed is None:
        return "-"
    low, high = row.quartiles[place]
    return f"{speed:,.0f} ({low:,.0f} to {high:,.0f})"


def _coloured(ratio: float | None, target: float | None) -> str:
    if ratio is None or target is None:
        return _number(ratio)
    return ("[green]" if ratio >= target else "[red]") + _number(ratio)


def _coloured_memory(row: Row) -> str:
    text = _mib(row.peer_peak_bytes)
    if row.memory_ratio is None or row.memory_target is None:
        return text
    is_met = row.memory_ratio <= row.memory_target
    return f"{'[green]' if is_met else '[red]'}{text} (ours {row.memory_ratio:.2f} of it)"


def _number(x: float | None, form: str = ".2f") -> str:
    return "-" if x is None else format(x, form)


def _mib(x: int | None) -> str:
    return "-" if x is None else f"{x / MIB:,.0f}"


def write_json(path: Path, rows: Sequence[Row]) -> None:
    """{"device", "commit", "rows"}, every row with its fields in order."""
    content = {"device": device_name(), "commit": commit(), "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
