"""One stack in a process of its own, started by measure.py. What it has to say are lines of JSON on standard output.

    python -m tempo_em.throughput.worker steps STACK CASE          a step for each line "go" on standard input
    python -m tempo_em.throughput.worker check STACK CASE FILE     one step on given responses; AdamW's first moments go into FILE
    python -m tempo_em.throughput.worker look STACK CASE FILE      before that, one step as it comes: {"peak_bytes"}
    python -m tempo_em.throughput.worker missing STACK CASE        what the stack lacks in this interpreter: {"missing"}

CASE is a JSON object of the fields of `Case`.
"""

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from safetensors.torch import save_file

from tempo_em.throughput.memory import peak, start_peak
from tempo_em.throughput.stacks import STACKS, Run
from tempo_em.throughput.turns import Turns
from tempo_em.throughput.work import Case

TINY = {
    "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
Say = Callable[[dict[str, Any]], None]


def check(run: Run, case: Case, say: Say, path: Path) -> None:
    moments = run(case, Turns(["go"], say), given=True)
    save_file({name: x.float().contiguous().cpu() for name, x in moments.items()}, path)


def memory(run: Run, case: Case, say: Say) -> None:
    """The highest resident memory of a first step less that before it: caches, gradients, moments and all temporary tensors; not
    the weights. A step of a tiny model went before: libraries load when they are first used. On a GPU, its allocator's peak."""
    model = {**case.model, **TINY} if isinstance(case.model, dict) else {"model_type": "llama", **TINY}
    tiny = replace(case, model=model, num_prompts=2, group_size=2, prompt_tokens=4, lengths=[3, 2, 3, 3], parts=1)
    run(tiny, Turns(["go"], lambda took: None))
    gc.collect()
    before = 0

    def commands() -> Any:
        nonlocal before
        ctypes.CDLL(None).malloc_trim(0)
        before = start_peak()
        yield "go"

    took: list[dict[str, Any]] = []
    run(case, Turns(commands(), took.append))
    say({"peak_bytes": peak() - before} | took[0])  # a stack that works elsewhere says its own


def say_nothing_else() -> Say:
    """Standard output is for JSON; what libraries print goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=out, flush=True)

    return say


def main(kind: str, stack: str, case_json: str, *more: str) -> None:
    say = say_nothing_else()
    torch.set_num_threads(1)
    case = Case(**json.loads(case_json))
    try:
        if kind == "missing":
            return say({"missing": STACKS[stack].missing()})
        run = STACKS[stack].load()
        if kind == "steps":
            say({"ready": asdict(case)["name"]})
            run(case, Turns(iter(sys.stdin.readline, ""), say))
        elif kind == "check":
            check(run, case, say, Path(more[0]))
        else:
            memory(run, case, say)
            check(run, case, say, Path(more[0]))
    except Exception as error:  # a stack may fail in any way; the others still count
        say({"error": f"{type(error).__name__}: {error}".partition("\n")[0]})
        raise


if __name__ == "__main__":
    main(*sys.argv[1:])
