"""Measurements of the trainer's benchmark that need a process of their own, started by trainer.py: prints one line of JSON.

    python trainer_worker.py memory SIDE UPDATE WORK      the most memory that one update takes and what it computed:
                                                          {"peak_bytes", "metrics"}
    python trainer_worker.py speed FOLDER WORK            the engine's updates on one rank, or on those that torchrun started:
                                                          {"seconds", "cpu_seconds"}; the first moments go into FOLDER

WORK is a JSON object of the fields of `Work`.
"""

import ctypes
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from tempo_engine import parallel
from trainer_sides import UPDATES, Side, Trainer, Update, Work, trainer

TINY = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 128}


def fresh(side: Side, update: Update, work: Work) -> Trainer:
    """A trainer before its first update, in a process that has run the same code: libraries load when they are first used."""
    trainer(side, update, replace(work, config=work.config | TINY, lengths=[12, 12, 8, 8])).update()
    return trainer(side, update, work)


def memory(side: Side, update: Update, work: Work) -> dict[str, Any]:
    """Highest resident memory during an optimiser's first update less that before it: gradients, moments and all temporary
    tensors; not the weights. Linux only."""
    one = fresh(side, update, work)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now
    metrics = one.update()
    return {"peak_bytes": _status("VmHWM") - before, "metrics": metrics}


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def speed(folder: Path, work: Work) -> dict[str, Any]:
    """Of a second update of each kind: wall-clock seconds from when all ranks are ready until the last one is done, and CPU seconds
    of the rank that used most. The first one, which also finds its memory and opens connections, gives the moments."""
    seconds, cpu_seconds = {}, {}
    for name in UPDATES:
        one = trainer("engine", name, work)
        one.update()
        moments = {parameter: moment.clone() for parameter, moment in one.moments().items()}
        if parallel.is_main():
            save_file(moments, folder / f"{name}-{parallel.world_size()}.safetensors")
        parallel.wait_for_all()
        wall, cpu = time.perf_counter(), time.process_time()
        one.update()
        cpu_seconds[name] = parallel.largest(time.process_time() - cpu)
        seconds[name] = parallel.largest(time.perf_counter() - wall)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds}


def main(kind: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    parallel.start()
    work = Work(**json.loads(arguments[-1]))
    if kind == "memory":
        result = memory(cast(Side, arguments[0]), cast(Update, arguments[1]), work)
    else:
        result = speed(Path(arguments[0]), work)
    if parallel.is_main():
        print(json.dumps(result), flush=True)
    parallel.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
    parallel.leave()
