"""Save, verify, resume, by any number of ranks. Safetensors and JSON only: nothing here can execute code when it is read.

A checkpoint is a folder `step-00000012`: `*.safetensors` that the ranks write their shards into (torch.distributed.checkpoint,
which reads them on any other number of ranks), `state.json`, and `manifest.json` with size and SHA-256 of all of these. It is
written under a temporary name, flushed to disk, read back and compared, then renamed: a folder with that name is complete. Only
then are older ones deleted.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from tempo_engine import parallel
from tempo_engine.errors import UserError

PREFIX = "step-"
MOVED = ".moved-"
FILE_BYTES = 256 << 20  # what a rank writes into one file, about: files are put together in host memory
MARGIN_BYTES = 16 << 20  # headers, state and manifest

Fingerprint = dict[str, Any]  # {"bytes": 3, "sha256": "ba7816bf..."}

# Said by torch whenever one process saves or loads for itself.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write the checkpoint of `step`, then delete all older ones but the newest `keep - 1`. Returns its path. Collective.

    `tensors` are shards (DTensor) or whole tensors that all ranks hold alike; `state` must be JSON, the main rank's is written.
    Raises UserError when the disk has no room for it, OSError when a rank cannot write; older checkpoints are kept then.
    """
    write = _Write(folder, step, tensors, state)
    with _os_error(f"the checkpoint of step {step} was not written, older ones were kept"):
        state_dict_saver.save(
            write.tensors, storage_writer=write.writer, planner=_Copying(), no_dist=parallel.world_size() == 1
        )
    return write.publish(keep)


class Checkpoints:
    """The checkpoints of a run: `folder` with the newest `keep` of them. Collective: all ranks make the same calls.

    `asynchronous`: `save` returns as soon as the tensors are copied to host memory; a thread writes them while the run goes on, and
    the checkpoint is published by a later `poll`, `save` or `finish`. A crash before that loses this one only. An error of the
    thread is raised by the call that would have published.
    """

    def __init__(self, folder: Path, *, keep: int = 2, asynchronous: bool = False) -> None:
        self.folder, self.keep, self.asynchronous = folder, keep, asynchronous
        # A group of its own: what the thread sends must not meet what the run sends.
        needs_group = asynchronous and parallel.world_size() > 1
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo")) if needs_group else None
        self._pending: tuple[_Write, Future[Any]] | None = None

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Save as the function `save` does; first wait for the checkpoint before."""
        self.finish()
        if not self.asynchronous:
            save(self.folder, step, tensors, state, keep=self.keep)
            return
        write = _Write(self.folder, step, tensors, state)
        future = state_dict_saver.async_save(
            write.tensors,
            storage_writer=write.writer,
            planner=_Copying(),
            process_group=self._group,
            no_dist=parallel.world_size() == 1,
        )
        self._pending = write, cast(Future[Any], future)

    def poll(self) -> None:
        """Publish the pending checkpoint if all ranks have written theirs; cheap enough for every step."""
        if self._pending and not parallel.largest(float(not self._pending[1].done())):
            self.finish()

    def finish(self) -> None:
        """Wait for the pending checkpoint, if there is one, and publish it."""
        if self._pending is None:
            return
        (write, future), self._pending = self._pending, None
        with _os_error(f"the checkpoint of step {write.step} was not written, older ones were kept"):
            future.result()
        write.publish(self.keep)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def has_any(folder: Path) -> bool:
    """Whether there is a checkpoint, whole or damaged."""
    _put_back(folder)
    return bool(list_checkpoints(folder))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file has the size and hash of its manifest.

    Collective: ranks divide the reading.
    """
    manifest, problem = parallel.from_main(lambda: _manifest(checkpoint))
    names = list(manifest)
    problems = parallel.together(
        [manifest[name]["bytes"] for name in names],
        lambda mine: [_difference(checkpoint / names[i], manifest[names[i]]) for i in mine],
    )
    return next(filter(None, [problem, *problems]), None)


def newest(folder: Path, warn: Callable[[str], Any] = print) -> Path:
    """The newest undamaged checkpoint; damaged ones are skipped aloud, by the main rank. Collective.

    Raises UserError when there is none.
    """

    def names_found() -> list[str]:
        _put_back(folder)
        return [path.name for path in reversed(list_checkpoints(folder))]

    for name in parallel.from_main(names_found):
        problem = damage(folder / name)
        if problem is None:
            return folder / name
        if parallel.is_main():
            warn(f"skipping the damaged checkpoint {folder / name}: {problem}")
    raise UserError(f"{folder} holds no usable checkpoint; start again in another --run-dir")


def read_state(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def names(checkpoint: Path) -> dict[str, torch.Size]:
    """Names of all tensors in it, with their shapes."""
    return {name: tensor.size for name, tensor in _saved(checkpoint).items()}


def load_tensors(checkpoint: Path, into: dict[str, Tensor]) -> set[str]:
    """Fill, in place, those of `into` that the checkpoint has, sharded as they are and in the dtype they have. Collective.

    Any folder of safetensors will do, a Hugging Face model too. Returns the names of those filled. Raises UserError when a tensor
    of that name has another shape.
    """
    saved = _saved(checkpoint)
    found = {name: tensor.detach() for name, tensor in into.items() if name in saved}
    for name, tensor in found.items():
        if saved[name].size != tensor.shape:
            raise UserError(
                f"{checkpoint} holds {name} with shape {list(saved[name].size)}, but the model here wants "
                f"{list(tensor.shape)}; use the config that it was saved with"
            )
    reader = HuggingFaceStorageReader(str(checkpoint))
    with _os_error(f"{checkpoint} cannot be read"):
        state_dict_loader.load(cast(dict[str, Any], found), storage_reader=reader, no_dist=parallel.world_size() == 1)
    return set(found)


def _saved(checkpoint: Path) -> dict[str, TensorStorageMetadata]:
    metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata()
    return cast(dict[str, TensorStorageMetadata], metadata.state_dict_metadata)


# --- On the way to disk ------------------------------------------------------------------------------------------------------


class _Write:
    """A checkpoint that is being written: under a temporary name until it is published."""

    def __init__(self, folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.folder, self.step, self.state = folder, step, json.dumps(state)
        self.tensors: dict[str, Any] = {name: tensor.detach() for name, tensor in tensors.items()}
        num_bytes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}  # over all ranks
        temporary = parallel.from_main(lambda: str(_make_room(folder, sum(num_bytes.values()))))
        self.writer = _Writer(Path(temporary), num_bytes)

    def publish(self, keep: int) -> Path:
        """Give it its name, when all ranks have written and verified their files."""
        each = [1] * parallel.world_size()  # one item a rank
        parts = parallel.together(each, lambda mine: [self.writer.files.fingerprints for _ in mine])
        fingerprints = {name: fingerprint for part in parts for name, fingerprint in sorted(part.items())}
        return self.folder / parallel.from_main(lambda: self._rename(fingerprints, keep))

    def _rename(self, fingerprints: dict[str, Fingerprint], keep: int) -> str:
        temporary, final = self.writer.folder, self.folder / f"{PREFIX}{self.step:08d}"
        for name, fingerprint in fingerprints.items():
            if not (temporary / name).is_file() or (temporary / name).stat().st_size != fingerprint["bytes"]:
                raise UserError(
                    f"the main process does not see {temporary / name}, which another process wrote; "
                    "choose a --run-dir on a file system that all machines share"
                )
        (temporary / "state.json").write_text(self.state, encoding="utf-8")
        manifest = fingerprints | {"state.json": _fingerprint(temporary / "state.json")}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for path in (temporary / "state.json", temporary / "manifest.json", temporary):
            _flush(path)
        if final.exists():  # out of the way in one step: a kill never leaves half a checkpoint under a good name
            final.rename(self.folder / f"{MOVED}{final.name}")
        temporary.rename(final)
        _flush(self.folder)
        # Folders of later steps are damaged ones that a resume skipped: they do not count, and this run writes them anew.
        older = [path for path in list_checkpoints(self.folder) if path.name < final.name]
        for old in older[: len(older) - keep + 1]:
            old.rename(self.folder / f".writing-old-{old.name}")
        for old in (*self.folder.glob(".writing-old-*"), *self.folder.glob(f"{MOVED}*")):
            shutil.rmtree(old)
        return final.name


def _put_back(folder: Path) -> None:
    """Checkpoints that were moved out of the way of one of the same step, which then was not published."""
    for moved in folder.glob(f"{MOVED}*"):
        final = folder / moved.name.removeprefix(MOVED)
        if not final.exists():
            moved.rename(final)


def _make_room(folder: Path, num_bytes: int) -> Path:
    """A fresh folder under a temporary name. What killed runs left is deleted.

    Raises UserError when the disk cannot take `num_bytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _put_back(folder)
    for leftover in folder.glob(".writing-*"):
        shutil.rmtree(leftover)
    free, needed = shutil.disk_usage(folder).free, num_bytes + num_bytes // 50 + MARGIN_BYTES
    if free < needed:
        raise UserError(
            f"{folder} has {free:,} bytes free, a checkpoint needs {needed:,} while the older ones are still there; "
            "make room, or lower checkpoint.keep, and go on with --resume"
        )
    temporary = folder / f".writing-{os.getpid()}"
    temporary.mkdir()
    return temporary


class _Writer(HuggingFaceStorageWriter):
    """Writes this rank's share into files of about FILE_BYTES and reads each back to see that it is what was meant."""

    def __init__(self, folder: Path, num_bytes: dict[str, int]) -> None:
        filled, file_of, limit = 0, {}, FILE_BYTES * parallel.world_size()
        for name, size in num_bytes.items():
            file_of[name] = 1 + filled // limit
            filled += size
        super().__init__(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
        self.folder = folder
        self.fs = self.files = _HashedFiles()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        done = super().write_data(plan, planner)
        for name, fingerprint in self.files.fingerprints.items():
            if _fingerprint(self.folder / name) != fingerprint:
                raise OSError(f"{self.folder / name} does not hold what was written to it")
        return done


class _HashedFiles(FileSystem):
    """Files whose fingerprints are taken of the bytes on their way to the disk, not of what the disk then holds."""

    def __init__(self) -> None:
        self.fingerprints: dict[str, Fingerprint] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # pyright: ignore
        with _HashedFile(io.FileIO(path, mode)) as file:
            yield file
        self.fingerprints[Path(path).name] = {"bytes": file.num_bytes, "sha256": file.sha.hexdigest()}


class _HashedFile(io.BufferedWriter):
    def __init__(self, raw: io.FileIO) -> None:
        super().__init__(raw)
        self.num_bytes, self.sha = 0, hashlib.sha256()

    def fileno(self) -> int:
        self.flush()  # torch asks for it to fsync, which does not know what is still buffered here
        return super().fileno()

    def write(self, data: Any) -> int:
        self.sha.update(data)
        self.num_bytes += len(data)
        return super().write(data)


class _Copying(DefaultSavePlanner):
    """Hands out copies in host memory: safetensors refuses tensors that share memory or have gaps."""

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return cast(Tensor, super().resolve_data(write_item)).to(
            "cpu", copy=True, memory_format=torch.contiguous_format
        )


@contextmanager
def _os_error(what: str) -> Iterator[None]:
    """The first rank's failure as an OSError: torch wraps failures in a BaseException with all ranks' tracebacks."""
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(error.failures.items()))
        if not isinstance(cause, Exception):  # KeyboardInterrupt
            raise cause from None
        raise OSError(f"{what}: rank {rank}: {cause}") from cause


# --- Fingerprints ------------------------------------------------------------------------------------------------------------


def _manifest(checkpoint: Path) -> tuple[dict[str, Fingerprint], str | None]:
    """Fingerprints of the files that are there and should be; or what is wrong with that."""
    try:
        written = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))
        manifest = {name: {"bytes": int(f["bytes"]), "sha256": f["sha256"]} for name, f in written.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        return {}, f"manifest.json cannot be read: {error}"
    there = {path.name for path in checkpoint.glob("*.safetensors")} | {"state.json"}
    if there != manifest.keys():
        odd = min(there ^ manifest.keys())
        return {}, f"{odd} is missing" if odd in manifest else f"{odd} is not in its manifest"
    return manifest, None


def _difference(path: Path, expected: Fingerprint) -> str | None:
    try:
        return None if _fingerprint(path) == expected else f"{path.name} is not what its manifest says"
    except OSError as error:
        return str(error)


def _fingerprint(path: Path) -> Fingerprint:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
