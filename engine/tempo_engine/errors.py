"""How a run ends early: by a mistake the user can mend, by a signal, by gradients that are not numbers, by servers."""

import signal
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A mistake in a recipe, a file or a command. The command line prints the sentence and exits with code 2."""


class Interrupted(Exception):
    """A signal arrived; everything is saved. `code` is the exit code, 128 + the signal's number."""

    def __init__(self, number: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after a checkpoint; go on with --resume {run_dir}")
        self.code = 128 + number


class NonFinite(Exception):
    """Gradients were not finite too many steps in a row. `batch` holds the tensors of the last of these steps by name."""

    code = 3

    def __init__(self, what: str, count: int, batch: dict[str, Any]) -> None:
        super().__init__(f"the gradient of the {what} was not finite in {count} steps in a row; none of them was taken")
        self.batch = batch


class Halted(Exception):
    """Rollout servers died too often or hold other weights than the trainer, sampler and trainer disagree, or what says whether
    responses are right fails: somebody must look.

    The run can go on from where it was.
    """

    code = 4


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's message: some print whole pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")
