"""Where rows were measured, the JSON file they are written to, and the table a person reads."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tempo_kernels.bench.measure import MIB, Row
from tempo_kernels.compile import Compiled

if TYPE_CHECKING:
    from rich.table import Table


def device_name(device: torch.device | None = None) -> str:
    """Name of the GPU or of the processor."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The checkout's commit, `-dirty` when it was changed since; the installed version where there is no checkout."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # an environment inside somebody else's repository is no checkout of ours
    if git("ls-files", "--error-unmatch", "__init__.py") is not None:
        described = git("describe", "--always", "--dirty", "--exclude=*")
        if described:
            return described
    try:
        return metadata.version("tempo-engine")
    except metadata.PackageNotFoundError:
        return "unknown"


def write_json(path: Path, rows: Sequence[Row | Compiled], device: torch.device | None = None) -> None:
    """{"device", "commit", "rows"}: what ran where, and every row, compared or compiled, with its fields in order."""
    fields = [row._asdict() if isinstance(row, Compiled) else asdict(row) for row in rows]
    content = {"device": device_name(device), "commit": commit(), "rows": fields}
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal; a ratio is ours / theirs, so less is better, memory is in MiB."""
    from rich.table import Table

    result = Table(title="ours against each peer: less is better")
    for heading in ("op and case", "peer", "ours", "theirs", "ratio", "target", "MiB", "peer's", "error", "note"):
        is_text = heading in ("op and case", "peer", "note")
        result.add_column(heading, justify="left" if is_text else "right", overflow="fold")

    def number(x: float | None, form: str = ".3g") -> str:
        return "-" if x is None else format(x, form)

    def mib(x: int | None) -> str:
        return "-" if x is None else f"{x / MIB:.1f}"

    for row in rows:
        colour = "" if row.target is None or row.ratio is None else "[green]" if row.ratio <= row.target else "[red]"
        error = row.error.get("ours", {}).get("logprob")
        times = [f"{x:.4g} {row.unit}" if x is not None else "-" for x in (row.ours, row.theirs)]
        result.add_row(
            f"{row.op} {row.case} {row.dtype}", row.peer, *times,
            colour + number(row.ratio), number(row.target), mib(row.peak_bytes), mib(row.peer_peak_bytes),
            number(error, ".1e"), row.note if row.checked else f"[red]{row.note}",
        )  # fmt: skip
    return result
