"""`tempo-engine bench kernels` as a user calls it."""

import json
from pathlib import Path

import pytest
from tempo_em.cli import app
from typer.testing import CliRunner

COMPARISON = ["op", "case", "dtype", "ours", "peer", "theirs", "ratio", "unit", "peak_bytes", "checked"]


def bench(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", "kernels", *arguments])
    return result.exit_code, " ".join((result.stdout + result.stderr).split())


def test_a_quick_run_prints_one_table_and_writes_its_rows(tmp_path: Path) -> None:
    code, output = bench("--quick", "--case", "policy_loss", "--json", str(tmp_path / "rows.json"))
    assert code == 0
    assert "policy_loss" in output
    written = json.loads((tmp_path / "rows.json").read_text())
    assert set(written) == {"device", "commit", "rows"}
    for row in written["rows"]:
        assert list(row)[: len(COMPARISON)] == COMPARISON
        assert row["checked"]
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])


def test_an_unknown_case_is_answered_with_the_known_ones() -> None:
    code, output = bench("--quick", "--case", "softmax")
    assert code == 2
    assert "no case contains 'softmax'; cases: linear_logprob" in output


def test_an_unknown_target_is_answered_with_the_known_ones() -> None:
    code, output = bench("--compile", "--target", "sm_70")
    assert code == 2
    assert "target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "sm_90"], "add --compile"),
        (["--compile", "--quick"], "drop one of them"),
        (["--compile", "--case", "advantage"], "drop one of them"),
        (["--quick", "--json", "nowhere/rows.json"], "the folder nowhere does not exist"),
        (["--compile", "--json", "nowhere/rows.json"], "the folder nowhere does not exist"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_runs(arguments: list[str], message: str) -> None:
    code, output = bench(*arguments)
    assert code == 2
    assert message in output
