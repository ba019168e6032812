"""The benchmarks' machinery: checks that bite, exact memory, rows that say why they are empty. No test looks at a time."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tempo_kernels.bench import Row, case_names, heads, measure, ops, peers, run_benchmarks, table, write_json
from tempo_kernels.bench.measure import Comparison, Side, Tensors, Truth, compare, peak_memory
from tempo_kernels.compile import Compiled
from torch import Tensor

CPU = torch.device("cpu")
FIELDS = ["op", "case", "dtype", "ours", "peer", "theirs", "ratio", "unit", "peak_bytes", "checked"]
X = torch.linspace(-2, 2, 1000, dtype=torch.float32)


def doubled(x: Tensor) -> Tensors:
    return {"y": 2 * x}


def comparison(peer: Side, ours: Side | None = None) -> Comparison:
    ours = ours or Side("default", lambda: lambda: doubled(X))
    return Comparison("double", "N=1000", "float32", ours, peer, Truth(doubled(X.double()), {"y": 0.0}))


def side(run: Callable[[], Tensors], **options: float) -> Side:
    return Side("somebody 1.0", lambda: run, **options)  # pyright: ignore[reportArgumentType]


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two short measurements for each side."""
    monkeypatch.setattr(measure, "REPEATS", 2)
    monkeypatch.setattr(measure, "SHORTEST_SECONDS", 0.0)


@pytest.mark.usefixtures("no_time")
def test_a_quick_run_checks_every_row_of_what_is_installed_and_goes_on_past_what_is_not() -> None:
    seen: list[Row] = []
    rows = run_benchmarks(quick=True, device=CPU, progress=seen.append)
    assert rows == seen
    assert {row.op for row in rows} == {
        "linear_logprob",
        "gather_logprob",
        "advantage",
        "policy_loss",
        "value_head_loss",
    }
    for row in rows:
        assert list(asdict(row))[: len(FIELDS)] == FIELDS
        if row.checked:
            assert row.ours is not None
            assert row.theirs is not None
            assert row.ratio == pytest.approx(row.ours / row.theirs)
            assert row.unit == "ms CPU"
            assert row.peak_bytes is not None
            assert row.error["ours"]
        else:
            assert row.note.startswith("peer: not installed: pip install 'tempo-engine[bench]' (")
            assert row.ours is row.theirs is row.ratio is None
    products = [row for row in rows if row.peer.startswith("three bare products")]
    assert len(products) == 7
    assert all(row.checked for row in products)


@pytest.mark.usefixtures("no_time")
def test_only_the_chosen_cases_run() -> None:
    rows = run_benchmarks(["advantage", "policy"], quick=True, device=CPU)
    assert [row.op for row in rows] == ["advantage", "policy_loss"]


def test_an_unknown_case_is_answered_with_the_cases() -> None:
    with pytest.raises(ValueError, match="no case contains 'softmax'; cases: linear_logprob H=64"):
        run_benchmarks(["softmax"], quick=True, device=CPU)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: {"y": 2 * X + 1e-4},
        lambda: {"y": torch.where(X > 1.99, float("nan"), 2 * X)},
        lambda: {"y": 2 * X[:-1]},
        lambda: {"z": 2 * X},
    ],
    ids=["a little off", "one NaN", "one too few", "nothing"],
)
def test_a_peer_that_computes_something_else_is_never_timed(wrong: Callable[[], Tensors]) -> None:
    calls = []

    def run() -> Tensors:
        calls.append(1)
        return wrong()

    row = compare(comparison(side(run)), {}, CPU)
    assert row.note.startswith("peer: failed the check")
    assert not row.checked
    assert row.ours is row.theirs is row.ratio is None
    assert len(calls) == 1


def test_our_own_error_fails_the_row_too() -> None:
    ours = Side("default", lambda: lambda: {"y": 3 * X})
    row = compare(comparison(side(lambda: doubled(X)), ours), {}, CPU)
    assert row.note.startswith("ours: failed the check: y off by 2 ")
    assert row.theirs is None


@pytest.mark.usefixtures("no_time")
def test_a_coarse_peer_is_held_to_its_own_tolerance_and_its_error_is_told() -> None:
    row = compare(comparison(side(lambda: {"y": 2 * X + 0.01}, tolerance=0.01)), {}, CPU)  # 0.01 of the largest, 4
    assert row.checked
    assert row.note == "the peer's y only within its own tolerance, 0.01"
    assert row.error["peer"]["y"] == pytest.approx(0.01, rel=1e-3)
    assert row.error["ours"]["y"] == 0
    assert not compare(comparison(side(lambda: {"y": 2 * X + 0.05}, tolerance=0.01)), {}, CPU).checked


def test_a_peer_that_is_not_installed_is_told_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = heads.head_inputs(heads.HeadShape(8, 20, 3, torch.float32), CPU)

    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    row = compare(comparison(peers.trl_chunks(inputs)), {}, CPU)
    assert row.note == "peer: not installed: pip install 'tempo-engine[bench]' (No module named 'trl.kernels')"
    assert not row.checked
    row = compare(comparison(peers.cut_cross_entropy(inputs)), {}, CPU)
    by_hand = "by hand, on a GPU: pip install cut-cross-entropy"
    assert row.note == f"peer: not installed: {by_hand} (No module named 'cut_cross_entropy')"


def test_a_package_that_a_peer_misses_only_as_it_runs_is_missing_too() -> None:
    def run() -> Tensors:
        raise ModuleNotFoundError("No module named 'pandas'")

    row = compare(comparison(Side("somebody", lambda: run, "pip install 'somebody>=2'")), {}, CPU)
    assert row.note == "peer: not installed: pip install 'somebody>=2' (No module named 'pandas')"


def test_a_peer_that_breaks_costs_its_row_only() -> None:
    def run() -> Tensors:
        raise RuntimeError("no such device\nand a long trace")

    row = compare(comparison(side(run)), {}, CPU)
    assert row.note == "peer: failed: RuntimeError: no such device"


def test_the_truth_of_the_head_is_what_a_person_computes() -> None:
    ones = torch.ones(1, 1, requires_grad=True)
    head_VD = torch.tensor([[0.0], [torch.log(torch.tensor(3.0)).item()]], requires_grad=True)  # p = 1/4, 3/4
    inputs = peers.HeadInputs(ones, head_VD, torch.tensor([1]), torch.tensor([1.0]), torch.tensor([0.0]))
    both, alone, dlogits_TV = heads.head_truths(inputs)
    assert both.values["logprob"].item() == pytest.approx(-0.2877, abs=1e-4)
    assert both.values["entropy"].item() == pytest.approx(0.5623, abs=1e-4)
    assert dlogits_TV.tolist() == [[pytest.approx(-0.25), pytest.approx(0.25)]]
    assert alone.values["d_head"].flatten().tolist() == [pytest.approx(-0.25), pytest.approx(0.25)]
    assert set(alone.values) == {"logprob", "d_hidden", "d_head"}


def test_peak_memory_is_exact_and_leaves_out_what_is_returned() -> None:
    megabyte = torch.zeros(250_000)

    def run() -> Tensors:
        x = megabyte + 1  # 1 MB
        y = torch.cat([x, x])  # 3 MB held
        del x  # 2 MB
        z = y[:1000] * 2  # 4 kB more
        del y
        return {"z": z, "total": torch.ones(2)}

    results, peak = peak_memory(run, CPU)
    assert set(results) == {"z", "total"}
    assert peak == 3_000_000 - 4000 - 8


def test_peak_memory_counts_what_autograd_keeps() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> Tensors:
        loss = x.exp().exp().sum()  # both results are kept for the backward pass
        return {"d_x": torch.autograd.grad(loss, x)[0]}

    _, peak = peak_memory(run, CPU)
    # beside them: the loss and its gradient, a scalar each; one product of 1000 becomes what is returned
    assert 8000 <= peak <= 8008 + 4000


@pytest.mark.usefixtures("no_time")
def test_json_holds_the_device_the_commit_and_the_rows(tmp_path: Path) -> None:
    nan = comparison(side(lambda: {"y": X * float("nan")}))
    rows = [compare(comparison(side(lambda: doubled(X))), {}, CPU), compare(nan, {}, CPU)]
    write_json(tmp_path / "rows.json", rows, CPU)
    content = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert list(content) == ["device", "commit", "rows"]
    assert content["device"]
    assert content["commit"]
    assert [Row(**row) for row in content["rows"]] == rows


def test_json_holds_compiled_kernels_too(tmp_path: Path) -> None:
    good = Compiled("linear_logprob bf16 STORE", "forward_kernel", "sm_90", 168, 0, 98304, 16, ())
    bad = good._replace(target="gfx942", spills=8, problems=("8 bytes of registers spilled",))
    compared = Row("double", "N=9", "float32", 2.0, "somebody", 4.0, 0.5, "ms CPU", 3, True)
    write_json(tmp_path / "rows.json", [good, bad, compared], CPU)
    content = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert list(content) == ["device", "commit", "rows"]
    first, second, third = content["rows"]
    assert list(first) == ["op", "kernel", "target", "registers", "spills", "shared", "mma", "problems"]
    assert first["problems"] == []
    assert second == {**first, "target": "gfx942", "spills": 8, "problems": ["8 bytes of registers spilled"]}
    assert Row(**third) == compared


@pytest.mark.usefixtures("no_time")
def test_a_case_says_how_the_default_budget_cuts_the_logits() -> None:
    assert heads.mode_of(heads.SHAPES[0], CPU) == "STORE"
    assert heads.mode_of(heads.GPU_SHAPES[-1], torch.device("cuda")) == "SLAB"
    (name, *_) = case_names(quick=True)
    rows = run_benchmarks([name], quick=True, device=CPU)
    assert rows[0].case == "H=64 V=4000 T=300, STORE by default"
    assert {row.case for row in rows if "F.linear" in row.peer} == {f"{rows[0].case}, log-prob only"}


@pytest.mark.parametrize("shape", [heads.SHAPES[0], heads.QUICK_SHAPES[0]])
def test_each_budget_makes_the_mode_it_is_named_after(shape: heads.HeadShape) -> None:
    *by_budget, (_, options) = heads.modes(shape)
    assert options == {"precise": True}
    for label, options in by_budget:
        assert label.partition(",")[0].removeprefix("narrow ") == heads.mode_of(shape, CPU, options["max_bytes"])


def test_the_roofline_of_8192_tokens_is_four_products_at_the_peak_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    shape = heads.HeadShape(4096, 151936, 8192, torch.bfloat16)
    side = heads.roofline(shape, torch.device("cuda"))
    assert side is not None
    assert side.name == "roofline of SLAB, H100"
    assert side.bound_ms == pytest.approx(4 * 2 * 8192 * 4096 * 151936 / 989e12 * 1000)
    assert heads.roofline(shape._replace(dtype=torch.float32), torch.device("cuda")) is None
    assert heads.roofline(shape, CPU) is None


def test_the_eager_formulas_return_what_our_ops_return() -> None:
    # no dual clip and no value clip: these two are always zero
    for make, zero in ((ops.policy_loss_comparison, "pg_clipfrac_lower"), (ops.value_head_comparison, "vf_clipfrac")):
        (one,) = make(200, 8, CPU)
        ours, eager = (set(side.load()()) for side in (one.ours, one.peer))
        assert {name.partition("/")[2] for name in ours - eager} == {zero}
        assert eager <= ours


def test_the_table_shows_times_targets_and_failures() -> None:
    done = Row("double", "N=9", "float32", 2.0, "somebody", 4.0, 0.5, "ms CPU", 3 * 2**20, True, target=0.75)
    failed = Row("double", "N=9", "float32", None, "else", None, None, "ms CPU", None, False, note="failed the check")
    console = Console(width=200, record=True)
    console.print(table([done, failed]))
    text = console.export_text()
    assert "2 ms CPU" in text
    assert "0.75" in text
    assert "3.0" in text
    assert "failed the check" in text
