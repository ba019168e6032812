import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tempo_engine import checkpoint
from tempo_engine.checkpoint import Checkpoints
from tempo_engine.errors import UserError
from torch import Tensor


def write(folder: Path, step: int, *, keep: int = 2) -> Path:
    return checkpoint.save(folder, step, {"w": torch.full((3,), float(step))}, {"iteration": step}, keep=keep)


def read(path: Path) -> list[float]:
    into = {"w": torch.zeros(3)}
    checkpoint.load_tensors(path, into)
    return into["w"].tolist()


def steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.list_checkpoints(folder)]


def spoil_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps something else than what it was given."""
    fingerprint = checkpoint._fingerprint

    def spoiled(path: Path) -> dict[str, Any]:
        if path.suffix == ".safetensors":
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        return fingerprint(path)

    monkeypatch.setattr(checkpoint, "_fingerprint", spoiled)


# --- Round trips -------------------------------------------------------------------------------------------------------------


def sample() -> dict[str, Tensor]:
    """Tensors of every kind; on two ranks those called shard/ are cut 3 + 2, 1 + 0, 4 + 3 and 5 + 4 rows."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "shard/uneven": normal(5, 3),
        "shard/one_row": normal(1, 4),
        "shard/half": normal(7).bfloat16(),
        "shard/double": normal(9, 2).double(),
        "replica/weight": normal(3, 2),
        "step": torch.tensor(7.0),
        "counts": torch.arange(4),
    }


def assert_comes_back(path: Path) -> None:
    expected = sample()
    into = {name: torch.full_like(tensor, 77) for name, tensor in expected.items()}
    assert checkpoint.load_tensors(path, into) == expected.keys() == checkpoint.names(path).keys()
    assert all(torch.equal(into[name], expected[name]) for name in expected)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, sample(), {"iteration": 3, "names": ["x"]})
    assert path.name == "step-00000003"
    assert checkpoint.newest(tmp_path) == path
    assert checkpoint.read_state(path) == {"iteration": 3, "names": ["x"]}
    assert_comes_back(path)


def test_tensors_that_share_memory_or_have_gaps_are_saved_like_others(tmp_path: Path) -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    path = checkpoint.save(tmp_path, 1, {"a": matrix, "b": matrix, "turned": matrix.T, "column": matrix[:, 1]}, {})
    into = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3), "turned": torch.zeros(3, 2), "column": torch.zeros(2)}
    checkpoint.load_tensors(path, into)
    assert into["a"].tolist() == into["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert into["turned"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert into["column"].tolist() == [1, 4]


def test_a_large_checkpoint_is_cut_into_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 64)
    path = checkpoint.save(tmp_path, 1, sample(), {})
    assert len(list(path.glob("*.safetensors"))) > 2
    assert_comes_back(path)


def test_only_what_was_asked_for_is_filled_and_in_its_own_dtype(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.tensor([1.0, 0.1]), "b": torch.ones(1)}, {})
    into = {"a": torch.zeros(2, dtype=torch.bfloat16), "c": torch.full((1,), 5.0)}
    assert checkpoint.load_tensors(path, into) == {"a"}
    assert into["a"].tolist() == [1.0, 0.10009765625]
    assert into["c"].tolist() == [5.0]


def test_a_parameter_is_filled_in_place(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.ones(2)}, {})
    parameter = torch.nn.Parameter(torch.zeros(2))
    checkpoint.load_tensors(path, {"a": parameter})
    assert parameter.tolist() == [1.0, 1.0]


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, {"a": torch.ones(2, 3)}, {})
    with pytest.raises(UserError, match=r"holds a with shape \[2, 3\], but the model here wants \[3, 2\]"):
        checkpoint.load_tensors(path, {"a": torch.zeros(3, 2)})


# --- What is kept ------------------------------------------------------------------------------------------------------------


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert steps(tmp_path) == [2, 10]


def test_a_skipped_damaged_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    for step in (1, 12):
        write(tmp_path, step)
    write(tmp_path, 11, keep=1)
    assert steps(tmp_path) == [11, 12]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 3)
    path = checkpoint.save(tmp_path, 3, {"w": torch.ones(3)}, {"again": True})
    assert checkpoint.read_state(path) == {"again": True}
    assert read(path) == [1.0, 1.0, 1.0]
    assert not list(tmp_path.glob(".writing-*"))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_older_checkpoints_go_only_after_the_new_one_was_read_back_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, asynchronous=asynchronous)

    def save(step: int) -> None:
        checkpoints.save(step, {"w": torch.zeros(3)}, {})
        checkpoints.finish()

    save(1)
    with monkeypatch.context() as context:
        spoil_what_is_written(context)
        with pytest.raises(OSError, match="does not hold what was written to it"):
            save(2)
    assert steps(tmp_path) == [1]
    save(3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_without_room_on_the_disk_nothing_is_written_and_nothing_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1, keep=1)
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 2_000_000))
    with pytest.raises(UserError, match="has 2,000,000 bytes free, a checkpoint needs 20,857,216") as caught:
        checkpoint.save(tmp_path, 2, {"w": torch.zeros(1_000_000)}, {}, keep=1)
    assert str(tmp_path) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# --- Damage ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "foreign", "no manifest", "half a manifest"])
def test_a_damaged_newest_checkpoint_is_skipped_aloud(tmp_path: Path, damage: str) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    (weights,) = newest.glob("*.safetensors")
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[:-1])
    elif damage == "flipped":
        weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif damage == "missing":
        weights.unlink()
    elif damage == "foreign":
        (newest / "other.safetensors").write_bytes(data)
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{}")
    said: list[str] = []
    path = checkpoint.newest(tmp_path, said.append)
    assert read(path) == [1.0, 1.0, 1.0]
    assert len(said) == 1
    assert "step-00000002" in said[0]


def test_without_a_usable_checkpoint_the_user_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable checkpoint"):
        checkpoint.newest(tmp_path)


def test_the_manifest_lists_sizes_and_hashes(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest) == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert all(manifest[name]["bytes"] == (path / name).stat().st_size for name in manifest)
    assert all(len(entry["sha256"]) == 64 for entry in manifest.values())


def test_a_write_that_was_cut_off_leaves_no_checkpoint_and_is_cleaned_up(tmp_path: Path) -> None:
    (tmp_path / ".writing-99").mkdir(parents=True)
    (tmp_path / ".writing-99" / "shard.safetensors").write_bytes(b"half")
    assert checkpoint.list_checkpoints(tmp_path) == []
    write(tmp_path, 1)
    assert not list(tmp_path.glob(".writing-*"))


def save_until_killed(folder: Path, first: int, asynchronous: bool) -> None:
    """A child process that saves one checkpoint after another."""
    try:
        checkpoints = Checkpoints(folder, asynchronous=asynchronous)
        for step in range(first, 1_000_000):
            checkpoints.save(
                step, {"w": torch.full((3,), float(step)), "ballast": torch.zeros(100_000)}, {"step": step}
            )
    finally:
        os._exit(1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_in_the_middle_of_a_save_the_newest_checkpoint_is_whole(tmp_path: Path, asynchronous: bool) -> None:
    moments, last = random.Random(0), 0
    write(tmp_path, 0)
    for _ in range(15):
        child = os.fork()
        if child == 0:
            save_until_killed(tmp_path, last + 1, asynchronous)
        time.sleep(moments.uniform(0.01, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        path = checkpoint.newest(tmp_path, pytest.fail)
        assert int(path.name.removeprefix("step-")) >= last
        last = int(path.name.removeprefix("step-"))
        assert read(path) == [float(last)] * 3
    assert last > 0
    write(tmp_path, last + 1)
    assert steps(tmp_path) == [last, last + 1]
    assert not list(tmp_path.glob(".writing-*"))


# --- In the background -------------------------------------------------------------------------------------------------------


def test_saving_in_the_background_writes_the_bits_of_the_call_whatever_the_run_does_meanwhile(tmp_path: Path) -> None:
    tensors, checkpoints = sample(), Checkpoints(tmp_path, asynchronous=True)
    state = {"iteration": 5}
    checkpoints.save(5, tensors, state)
    state["iteration"] = 6
    for tensor in tensors.values():
        tensor.zero_()
    while not checkpoint.list_checkpoints(tmp_path):
        checkpoints.poll()
    path = checkpoint.newest(tmp_path, pytest.fail)
    assert checkpoint.read_state(path) == {"iteration": 5}
    assert_comes_back(path)


def test_the_next_save_publishes_the_one_before(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(1, {"w": torch.zeros(3)}, {})
    checkpoints.save(2, {"w": torch.zeros(3)}, {})
    assert steps(tmp_path) == [1]
    checkpoints.finish()
    checkpoints.finish()
    checkpoints.poll()
    assert steps(tmp_path) == [1, 2]


def test_an_error_of_the_background_is_raised_by_poll(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_what_is_written(monkeypatch)
    checkpoints = Checkpoints(tmp_path, asynchronous=True)
    checkpoints.save(1, {"w": torch.zeros(3)}, {})

    def poll_on() -> None:
        for _ in range(1000):
            checkpoints.poll()
            time.sleep(0.01)

    with pytest.raises(OSError, match="step 1 was not written, older ones were kept"):
        poll_on()
    assert steps(tmp_path) == []


# --- On two ranks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that two ranks worked in, and what each of them found. See ranks/checkpoint.py."""
    folder = tmp_path_factory.mktemp("ranks")
    save_file(sample(), folder / "expected.safetensors")
    checkpoint.save(folder / "one", 1, sample(), {"from": 1})
    script = Path(__file__).parent / "ranks" / "checkpoint.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return folder, [json.loads((folder / f"result-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("saved_by", ["one", "two", "background"])
def test_two_ranks_read_the_same_bits(two_ranks: tuple[Path, list[dict[str, Any]]], saved_by: str) -> None:
    assert [found[f"differing/{saved_by}"] for found in two_ranks[1]] == [[], []]


@pytest.mark.parametrize("saved_by", ["two", "background"])
def test_one_process_reads_the_same_bits(two_ranks: tuple[Path, list[dict[str, Any]]], saved_by: str) -> None:
    path = checkpoint.newest(two_ranks[0] / saved_by, pytest.fail)
    assert checkpoint.read_state(path) == {"from": 2}
    assert len(list(path.glob("*.safetensors"))) == 2
    assert_comes_back(path)


def test_ranks_agree_which_checkpoint_is_damaged_and_one_of_them_says_so(
    two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    main, other = two_ranks[1]
    assert main["newest"] == other["newest"] == "step-00000001"
    assert len(main["said"]) == 1
    assert other["said"] == []


def test_when_one_rank_cannot_write_all_ranks_raise_and_the_older_checkpoint_stays(
    two_ranks: tuple[Path, list[dict[str, Any]]],
) -> None:
    for found in two_ranks[1]:
        assert "rank 1: [Errno 28] No space left on device" in found["error"]
    assert steps(two_ranks[0] / "two") == [1]
