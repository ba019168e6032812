"""How a run ends early: by a mistake the user can mend, or by a signal."""

import signal
from pathlib import Path


class UserError(ValueError):
    """A mistake in a recipe, a file or a command. The command line prints the sentence and exits with code 2."""


class Interrupted(Exception):
    """A signal arrived; everything is saved. `code` is the exit code, 128 + the signal's number."""

    def __init__(self, number: int, run_dir: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name} after a checkpoint; go on with --resume {run_dir}")
        self.code = 128 + number


def first_sentence(error: BaseException) -> str:
    """The first sentence of a library's message: some print whole pages."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")
