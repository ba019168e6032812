"""Ranks, budgets, recomputation and where weights come from must not show in a gradient."""

import os
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tempo_engine import parallel
from tempo_engine.weights import create_causal_lm
from torch import Tensor

SCRIPT = Path(__file__).parent / "ranks" / "gradients.py"
CASES, CONFIG = (runpy.run_path(str(SCRIPT))[name] for name in ("CASES", "CONFIG"))


Found = dict[int, dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What one process and what two ranks found, by case."""
    results = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        create_causal_lm(CONFIG, dtype=torch.float64, attention="sdpa", seed=0).save_pretrained(folder / "model")
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        result = subprocess.run(
            [sys.executable, *torchrun, str(SCRIPT), str(folder)],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        results[ranks] = {case: load_file(folder / f"{case}.safetensors") for case in CASES}
    return results


def difference(mine: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Length of the difference of two gradients, relative to the length of `other`."""
    names = [name for name in other if name.endswith("/exp_avg")]
    square = sum(float((mine[name].double() - other[name].double()).square().sum()) for name in names)
    return (square / sum(float(other[name].double().square().sum()) for name in names)) ** 0.5


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process_with_one_micro_batch(found: Found, case: str, ranks: int) -> None:
    mine, reference = found[ranks][case], found[1][CASES[case]["like"]]
    assert mine.keys() == reference.keys()
    largest = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.1}
    assert difference(mine, reference) < largest[CASES[case].get("dtype", torch.float64)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "bfloat16"])
def test_values_log_probs_and_metrics_do_not_depend_on_ranks_and_micro_batches(found: Found, case: str) -> None:
    for name in ("values", "logprobs", "metrics"):
        for ranks in (1, 2):
            mine, reference = found[ranks][case][name], found[1][CASES[case]["like"]][name]
            assert torch.allclose(mine, reference, rtol=2e-5, atol=2e-5), name


def test_items_go_to_the_rank_with_least_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    assert parallel.divide([5, 4, 3, 2]) == [[0, 3], [1, 2]]
    assert parallel.divide([1]) == [[0], []]


@given(costs=st.lists(st.integers(0, 100), max_size=40), ranks=st.integers(1, 9))
def test_shares_cover_every_item_once_and_none_is_above_the_mean_by_more_than_one_item(
    costs: list[int], ranks: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "world_size", lambda: ranks)
        shares = parallel.divide(costs)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert len(shares) == ranks
    assert max(sum(costs[i] for i in share) for share in shares) <= sum(costs) / ranks + max(costs, default=0)


def test_one_process_is_the_identity() -> None:
    x = torch.tensor([1.0, 2.0])
    assert (parallel.rank(), parallel.is_main()) == (0, True)
    assert parallel.together([3, 1], lambda mine: [10 * i for i in mine]) == [0, 10]
    assert parallel.from_main(lambda: "decided") == "decided"
    assert parallel.add_up(x) is x
    assert parallel.largest(2.5) == 2.5
    assert parallel.sum_metrics({"a": x[0]}, {"b_max": x[1]}) == ({"a": 1.0}, {"b_max": 2.0})
    assert parallel.whole(x) is x


def test_a_thread_that_is_alone_is_the_only_process_and_no_other_thread_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)

    def where() -> tuple[int, int, bool]:
        return parallel.rank(), parallel.world_size(), parallel.is_main()

    with ThreadPoolExecutor(max_workers=1) as beside:
        with parallel.alone():
            assert where() == (0, 1, True)
            assert parallel.from_main(lambda: "decided here") == "decided here"
            assert beside.submit(where).result() == (1, 2, False)
        assert where() == (1, 2, False)


def test_an_error_ends_being_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(parallel.dist, "get_world_size", lambda: 2)
    with pytest.raises(KeyError), parallel.alone():
        raise KeyError
    assert parallel.world_size() == 2
