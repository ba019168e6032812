"""What a run's folder says of its data: data.json (files, hashes, commits, counts) and quarantine.jsonl (rows that were bad)."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tempo_engine.data.load import content_hash
from tempo_engine.errors import UserError

from tempo_em.datasets import Dataset

FILE, QUARANTINE = "data.json", "quarantine.jsonl"


def account(datasets: Mapping[str, Dataset]) -> dict[str, dict[str, Any]]:
    """By the name of each set: its files with hashes, counts, and one hash of its questions and answers."""
    return {
        name: dataset.loaded.account()
        if dataset.loaded
        else {"questions": len(dataset.questions), "content": content_hash(dataset.questions)}
        for name, dataset in datasets.items()
    }


def sentences(datasets: Mapping[str, Dataset]) -> list[str]:
    """One line for each source of rows: what was read, which columns were taken, what was left out."""
    return [dataset.loaded.sentence() for dataset in datasets.values() if dataset.loaded]


def write_account(datasets: Mapping[str, Dataset], run_dir: Path) -> None:
    """Both files, each in one piece; no quarantine where nothing was bad."""
    (run_dir / QUARANTINE).unlink(missing_ok=True)
    rows = [
        {"set": f"data.{name}", **asdict(bad)}
        for name, dataset in datasets.items()
        for bad in (dataset.loaded.intake.quarantine if dataset.loaded else ())
    ]
    if rows:
        _write(run_dir / QUARANTINE, "".join(json.dumps(row) + "\n" for row in rows))
    _write(run_dir / FILE, json.dumps(account(datasets), indent=1))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def check_unchanged(datasets: Mapping[str, Dataset], run_dir: Path) -> None:
    """Raises UserError naming a data file that is not what it was when the run in this folder began."""
    file = run_dir / FILE
    if not file.is_file():  # of before runs kept an account
        return
    before = json.loads(file.read_text(encoding="utf-8"))
    for name, dataset in datasets.items():
        now = dataset.loaded.files if dataset.loaded else []
        for file_name, old, new in changes(before.get(name, {}).get("files", []), now):
            raise UserError(
                f"data.{name}: the data file {file_name} is not what it was when {run_dir} began ({old} then, {new} now); "
                "put it back as it was, or begin a new run"
            )


def changes(before: list[dict[str, Any]], now: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(file, what it was, what it is) of each file that differs."""
    one, other = ({_name(f): f for f in files} for files in (before, now))
    for name in [*one, *(name for name in other if name not in one)]:
        if one.get(name, {}).get("sha256") != other.get(name, {}).get("sha256"):
            yield name, _version(one.get(name)), _version(other.get(name))


def _name(file: dict[str, Any]) -> str:
    # Parts of a benchmark lie in several data sets, under the same names.
    return f"{file['hub']}/{file['path']}" if "hub" in file else file["path"]


def _version(file: dict[str, Any] | None) -> str:
    if file is None:
        return "not there"
    return f"sha256 {file['sha256'][:12]}" + (f" of commit {file['commit']}" if "commit" in file else "")
