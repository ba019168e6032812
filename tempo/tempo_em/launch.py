"""`--nproc N`: the same command as N ranks of one machine, through the library behind torchrun."""

import logging
import os
import sys
import tempfile
import uuid
from pathlib import Path

from tempo_engine.errors import UserError

# Rank 0 leaves its exit code here: torchrun only says that some rank failed.
EXIT_CODE_FILE = "TEMPO_EXIT_CODE_FILE"
# A rank that was told to stop finishes its iteration and saves; how long that takes only the user can know.
SHUTDOWN_SECONDS = 24 * 3600


def launch(nproc: int, arguments: list[str]) -> int:
    """Start `nproc` ranks of `tempo-engine ARGUMENTS` and wait; returns rank 0's exit code.

    Raises UserError when the machine has GPUs, but fewer.
    """
    import torch
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    gpus = torch.cuda.device_count()
    if gpus and nproc > gpus:
        raise UserError(f"--nproc is {nproc}, but this machine has {gpus} GPUs; lower it")
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks say what went wrong
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // nproc)))  # ranks must not fight for cores
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "code"
        os.environ[EXIT_CODE_FILE] = str(code)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=SHUTDOWN_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        failed = 0
        try:
            elastic_launch(config, sys.executable)("-m", "tempo_em", *arguments)
        except ChildFailedError as error:
            failed = next(iter(error.failures.values())).exitcode
        except SignalException as error:
            failed = 128 + error.sigval
        return int(code.read_text()) if code.is_file() else (failed if failed >= 0 else 128 - failed)


def is_rank() -> bool:
    """Whether this process is one of several that torchrun started."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def report_exit_code(code: int) -> None:
    """Tell the process that launched the ranks how rank 0 ended."""
    if EXIT_CODE_FILE in os.environ and os.environ.get("RANK") == "0":
        Path(os.environ[EXIT_CODE_FILE]).write_text(str(code))
