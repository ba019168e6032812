"""Started by torchrun: checkpoints of two ranks. Each rank writes what it found to FOLDER/result-RANK.json.

python -m torch.distributed.run --nproc-per-node 2 checkpoint.py FOLDER, which holds expected.safetensors and one/ (a checkpoint of
the same tensors by a single process).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tempo_engine import checkpoint, parallel
from tempo_engine.checkpoint import Checkpoints
from tempo_engine.parallel import local, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def spread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """By the first part of their names: shards of two ranks, replicas on both, or plain tensors."""
    shards = init_device_mesh("cpu", (2,))
    replicas = init_device_mesh("cpu", (2, 1))
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("shard/"):
            result[name] = distribute_tensor(tensor, shards, [Shard(0)])
        elif name.startswith("replica/"):
            result[name] = distribute_tensor(tensor, replicas, [Replicate(), Shard(0)])
        else:
            result[name] = tensor.clone()
    return result


def differing(path: Path, expected: dict[str, Tensor]) -> list[str]:
    """Names of tensors that do not come back bit for bit, gathered from both ranks' shards."""
    into = spread({name: torch.full_like(tensor, 77) for name, tensor in expected.items()})
    assert checkpoint.load_tensors(path, into) == expected.keys()
    return [name for name, tensor in into.items() if not torch.equal(whole(tensor), expected[name])]


def save_in_background(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Zero the tensors while a thread writes them."""
    checkpoints = Checkpoints(folder, asynchronous=True)
    checkpoints.save(1, tensors, {"from": 2})
    for tensor in tensors.values():
        local(tensor).zero_()
    while not checkpoint.list_checkpoints(folder):
        checkpoints.poll()


def fail_on_rank_1(folder: Path, tensors: dict[str, Tensor]) -> str:
    def no_space(self: Any, path: Any, mode: str) -> Any:
        raise OSError(28, "No space left on device")

    if parallel.rank() == 1:
        checkpoint._HashedFiles.create_stream = no_space
    try:
        checkpoint.save(folder, 2, tensors, {})
    except OSError as error:
        return str(error)
    return "nothing was raised"


def main(folder: Path) -> None:
    parallel.start()
    expected = load_file(folder / "expected.safetensors")
    found: dict[str, Any] = {"differing/one": differing(folder / "one" / "step-00000001", expected)}
    checkpoint.save(folder / "two", 1, spread(expected), {"from": 2})
    found["differing/two"] = differing(folder / "two" / "step-00000001", expected)
    save_in_background(folder / "background", spread(expected))
    found["differing/background"] = differing(folder / "background" / "step-00000001", expected)

    checkpoint.save(folder / "damaged", 1, spread(expected), {})
    checkpoint.save(folder / "damaged", 2, spread(expected), {})
    if parallel.is_main():
        file = max((folder / "damaged" / "step-00000002").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1])
    parallel.wait_for_all()
    said: list[str] = []
    found["newest"] = checkpoint.newest(folder / "damaged", said.append).name
    found["said"] = said

    found["error"] = fail_on_rank_1(folder / "two", spread(expected))
    (folder / f"result-{parallel.rank()}.json").write_text(json.dumps(found))
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    parallel.leave()
