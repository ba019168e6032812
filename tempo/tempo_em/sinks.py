"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, trackio. None of them can stop a run."""

import json
import math
import time
import uuid
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from tempo_engine.errors import UserError, first_sentence

from tempo_em.recipe import TrackingRecipe

# What a later process must know to go on with the same run: {"id": "3f9a..."}.
FILE = "tracking.json"


class Sink(Protocol):
    """Told what metrics.jsonl is told, numbers only."""

    def begin(self, recipe: Mapping[str, Any], run_dir: Path, step: int) -> None:
        """The run begins or, after a resume, goes on from `step`: what was written of later steps is void."""
        ...

    def write(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, by tensorboard's own writer."""

    def begin(self, recipe: Mapping[str, Any], run_dir: Path, step: int) -> None:
        self.proto = import_module("tensorboard.compat.proto.event_pb2")
        self.summary = import_module("tensorboard.compat.proto.summary_pb2").Summary
        writer = import_module("tensorboard.summary.writer.event_file_writer").EventFileWriter
        self.writer = writer(str(run_dir / "tensorboard"))
        start = self.proto.SessionLog(status=self.proto.SessionLog.START)
        self.writer.add_event(self.proto.Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [self.summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.writer.add_event(self.proto.Event(wall_time=time.time(), step=step, summary=self.summary(value=values)))
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; WANDB_MODE=offline keeps it in the run folder."""

    def __init__(self, project: str) -> None:
        self.project = project

    def begin(self, recipe: Mapping[str, Any], run_dir: Path, step: int) -> None:
        self.run = import_module("wandb").init(
            project=self.project, name=run_dir.name, dir=str(run_dir), config=dict(recipe), id=run_id(run_dir), resume="allow"
        )  # fmt: skip

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """A run of trackio, in its local database. Runs are told apart by name, so it has the run's id in it."""

    def __init__(self, project: str) -> None:
        self.project = project

    def begin(self, recipe: Mapping[str, Any], run_dir: Path, step: int) -> None:
        name = f"{run_dir.name}-{run_id(run_dir)}"
        self.run = import_module("trackio").init(
            project=self.project, name=name, config=dict(recipe), resume="allow", embed=False
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


MAKERS: dict[str, Callable[[str], Sink]] = {
    "tensorboard": lambda project: TensorBoard(),
    "wandb": Wandb,
    "trackio": Trackio,
}


class Sinks:
    """All of a recipe's. The first failure of each is told; the run goes on. Without a recipe (other ranks) there are none."""

    def __init__(self, how: TrackingRecipe | None, note: Callable[[str], None]) -> None:
        self.note = note
        self.sinks = {name: MAKERS[name](how.project) for name in how.sinks} if how else {}
        self._told: set[str] = set()

    def begin(self, recipe: Mapping[str, Any], run_dir: Path, step: int) -> None:
        """One that cannot begin is left out."""
        self.sinks = {
            name: sink
            for name, sink in self.sinks.items()
            if self._try(name, lambda sink=sink: sink.begin(recipe, run_dir, step))
        }

    def write(self, step: int, row: Mapping[str, Any]) -> None:
        """The finite numbers of a row of metrics.jsonl, under their names there."""
        numbers = {
            name: float(value)
            for name, value in row.items()
            if name not in ("step", "iteration") and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, sink in self.sinks.items():
            self._try(name, lambda sink=sink: sink.write(step, numbers))

    def close(self) -> None:
        for name, sink in self.sinks.items():
            self._try(name, sink.close)
        self.sinks = {}

    def _try(self, name: str, call: Callable[[], None]) -> bool:
        try:
            call()
        except Exception as error:  # whatever a tracker does, training matters more
            if name not in self._told:
                self._told.add(name)
                self.note(f"tracking by {name} fails, metrics.jsonl has everything: {first_sentence(error)}")
            return False
        return True


def check_installed(how: TrackingRecipe) -> None:
    """Raises UserError when a sink's package is missing."""
    for name in how.sinks:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # the latter: a folder of that name, such as wandb leaves behind
            raise UserError(
                f"tracking.sinks has {name}, which is not installed; pip install 'tempo-engine[{name}]', or leave it out"
            )


def run_id(run_dir: Path) -> str:
    """The run's name with trackers: made once, then read from the run folder."""
    file = run_dir / FILE
    if file.is_file():
        return str(json.loads(file.read_text(encoding="utf-8"))["id"])
    made = uuid.uuid4().hex[:12]
    file.write_text(json.dumps({"id": made}), encoding="utf-8")
    return made
