"""Rollouts between generation and update: written down at once, so that a run killed during the update need not sample again."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tempo_engine import parallel
from tempo_engine.rollout import Rollout


@dataclass(frozen=True)
class Sampled:
    """What one iteration sampled: labelled responses with their verified rewards in [0, 1], and unlabelled ones.

    `accuracy` is that of all labelled responses, kept or not (None: there were none). `num_responses` and `num_tokens` count what
    was sampled, kept or not, `cursors` are the positions in the data after it. `beliefs` are the outcomes in [0, 1] of the
    unlabelled responses, where their answers tell them; none where the critic does.
    """

    labelled: list[Rollout]
    rewards: list[float]
    accuracy: float | None
    unlabelled: list[Rollout]
    num_responses: int
    num_tokens: int
    cursors: dict[str, int]
    beliefs: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        lists = {"labelled": [r.to_json() for r in self.labelled], "unlabelled": [r.to_json() for r in self.unlabelled]}
        return vars(self) | lists

    @staticmethod
    def from_json(fields: dict[str, Any]) -> "Sampled":
        rollouts = {name: [Rollout.from_json(r) for r in fields[name]] for name in ("labelled", "unlabelled")}
        whole: dict[str, Any] = fields | rollouts
        return Sampled(**whole)


class Waiting:
    """The file that holds the last iteration's rollouts under its key ("em/12"). A damaged or foreign one is as good as none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._found: dict[str, Any] | None = None

    def find(self) -> None:
        """Read what a killed run left. All ranks must ask."""
        self._found = parallel.from_main(lambda: _read(self.path))

    def take(self, key: str, version: int) -> Sampled | None:
        """The rollouts of this occasion, sampled from the policy's present version. Only the first one after a resume has any."""
        found, self._found = self._found, None
        if found is None or (found["key"], found["version"]) != (key, version):
            return None
        return Sampled.from_json(found["sampled"])

    def keep(self, key: str, version: int, sample: Callable[[], Sampled]) -> Sampled:
        """Sample, and write down before anything is done with it."""
        sampled = sample()
        if parallel.is_main():
            text = json.dumps({"key": key, "version": version, "sampled": sampled.to_json()})
            temporary = self.path.with_suffix(".writing")
            with temporary.open("w", encoding="utf-8") as file:
                file.write(f"{_hash(text)}\n{text}")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
        return sampled


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        digest, _, text = path.read_text(encoding="utf-8").partition("\n")
    except UnicodeDecodeError:
        return None
    return json.loads(text) if _hash(text) == digest else None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
