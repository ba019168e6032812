"""`tempo-engine report`: reads run folders, writes the page, and with --watch again every few seconds."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tempo_engine.errors import UserError

from tempo_em.report.page import render
from tempo_em.report.runs import read_run

SECONDS = 5


def report(
    folders: Sequence[Path],
    to: Path | None,
    *,
    watch: bool,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """Write one page on these runs and return its path. With `watch`, again every few seconds until all of them are finished.

    Raises UserError when a folder holds no run, or the page has no place to go.
    """
    if to is None and len(folders) > 1:
        raise UserError("one page on several runs belongs to none of their folders: say --to FILE.html")
    target = to or folders[0] / "report.html"
    runs = [read_run(folder) for folder in folders]
    if target.is_dir() or not target.absolute().parent.is_dir():
        raise UserError(f"--to {target}: that is a folder, or its folder does not exist; name a file in one that does")
    while True:
        goes_on = watch and not all(run.is_finished for run in runs)
        _write(target, render(runs, refresh=SECONDS if goes_on else None))
        say(f"wrote {target}")
        if not goes_on:
            return target
        try:
            sleep(SECONDS)
        except KeyboardInterrupt:  # the last page must not go on loading itself
            _write(target, render(runs))
            return target
        runs = [read_run(folder) for folder in folders]


def _write(target: Path, page: bytes) -> None:
    """In one piece: a browser may be reading it."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.write_bytes(page)
    temporary.replace(target)
