"""Every kernel compiles for every GPU we name, in a process of its own: here Triton is an interpreter."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tempo_kernels
from tempo_kernels.compile import DEVICES, compile_kernels

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# linear_logprob's products, where they are not read from memory instead
HAS_PRODUCTS = ("forward_kernel", "backward_kernel")


def all_kernels() -> set[str]:
    """Names of all kernels in the sources."""
    sources = Path(tempo_kernels.__file__).parent.rglob("*.py")
    return {name for file in sources for name in re.findall(r"^def _(\w+_kernel)\(", file.read_text(), re.MULTILINE)}


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=900)


def test_every_kernel_compiles_without_spills_within_shared_memory_and_with_matrix_instructions(tmp_path: Path):
    done = compiling("-m", "tempo_em", "bench", "kernels", "--compile", "--json", str(tmp_path / "compiled.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "compiled.json").read_text())["rows"]
    for target in DEVICES:
        ops = {row["op"].split()[0].rstrip(",") for row in rows if row["target"] == target}
        assert ops == {"linear_logprob", "gather_logprob", "value_head", "advantage", "policy_loss"}
    assert {row["kernel"] for row in rows} == all_kernels()
    for row in rows:
        assert row["spills"] == 0, row
        assert 0 < row["registers"] <= 512, row
        assert row["shared"] <= DEVICES[row["target"]].max_shared, row
        is_product = row["op"].startswith("linear_logprob bf16 SLAB") and row["kernel"] in HAS_PRODUCTS
        assert row["mma"] > 0 or not is_product, row
    assert "least work of a pass" in " ".join(done.stdout.lower().split())


SPILLING = """
from tempo_kernels.compile import compile_source, sources
source = next(s for s in sources("sm_80") if s.op == "linear_logprob bf16 SLAB")
if __name__ == "__main__":
    print(compile_source(source._replace(num_warps=4, num_stages=6), "sm_80").problems)
"""


def test_a_kernel_that_spills_and_wants_too_much_shared_memory_is_reported():
    done = compiling("-c", SPILLING)
    assert "bytes of registers spilled" in done.stdout, done.stderr
    assert "sm_80 has 166912" in done.stdout


def test_an_unknown_target_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="target must be one of sm_80, sm_90, sm_100, gfx942, got 'sm_70'"):
        compile_kernels(["sm_70"])


def test_an_interpreter_cannot_compile_and_says_why():
    with pytest.raises(ValueError, match="cannot be compiled here: TRITON_INTERPRET is set"):
        compile_kernels(["sm_90"])
