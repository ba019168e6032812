"""What doctor says of a machine: of this one, and of ones that lack something."""

import json
import shutil
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import tempo_em.machine as machine
import torch
from tempo_em.commands import doctor_command
from tempo_em.loading import load_recipe
from tempo_em.machine import Check, examine_machine
from tempo_kernels import dispatch

TINY = load_recipe("tiny", []).recipe


def checks(settings: list[str] | None = None) -> dict[str, Check]:
    recipe = load_recipe("tiny", settings or []).recipe
    return {check.name: check for check in examine_machine(recipe, Path("runs"))}


def test_this_machine_is_fit_and_every_finding_is_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_command("tiny", [], False, 1, tmp_path / "found.json") == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert "no drift" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert {"python", "packages", "processor", "gpu", "kernels", "triton", "rollouts", "memory", "disk"} <= {
        check["name"] for check in found["machine"]
    }
    assert "bad" not in {check["state"] for check in found["machine"]}


def test_something_bad_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "LEAST_DISK", 2**80)
    assert doctor_command("tiny", [], False, 1, None) == 1
    assert "bad   disk" in capsys.readouterr().out


def test_a_package_of_another_version_is_named_with_what_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version", lambda name: "0.1" if name == "safetensors" else version(name))
    found = next(check for check in machine.packages() if check.name == "packages")
    assert found.state == "bad"
    assert "safetensors>=0.5 (found 0.1)" in found.found


def test_an_extra_that_is_missing_is_a_note_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: Any = lambda name: None if name == "peft" else "9.9.9"  # noqa: E731
    monkeypatch.setattr(machine, "_installed", asked)
    found = next(check for check in machine.packages() if check.name == "lora")
    assert (found.state, found.found) == ("note", machine.EXTRAS["lora"])


def test_which_kernels_run_is_said_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.kernels().found == "PyTorch, because there is no GPU"
    monkeypatch.setenv("TEMPO_KERNELS", "torch")
    assert machine.kernels().found == "PyTorch, because TEMPO_KERNELS=torch"
    monkeypatch.setenv("TEMPO_KERNELS", "cuda")
    assert machine.kernels() == ("kernels", "bad", "TEMPO_KERNELS must be auto, triton or torch, got 'cuda'")


def test_a_kernel_is_compiled_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.triton_compiles().state == "note", "tests run the interpreter"
    monkeypatch.setattr(dispatch, "IS_INTERPRETED", False)

    def broken(source: Any, target: str) -> Any:
        raise RuntimeError("ptxas died. More words")

    monkeypatch.setattr(machine.compile, "sources", lambda target: [type("Source", (), {"op": "advantage, whitened"})])
    monkeypatch.setattr(machine.compile, "compile_source", broken)
    assert machine.triton_compiles() == ("triton", "bad", "a kernel cannot be compiled: ptxas died")


def test_a_gpu_that_torch_cannot_use_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_driver", lambda: "580.65")
    (found,) = machine.accelerators(TINY)
    assert found.state == "bad"
    assert "driver 580.65" in found.found
    assert "install a CUDA build" in found.found


def test_a_driver_that_does_not_answer_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'driver lost' >&2\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))
    assert machine._driver() is None


def test_servers_that_do_not_answer_are_bad() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    found = checks(["rollout.backend=sglang", f"rollout.sglang.servers=['{url}']"])["rollouts"]
    assert found.state == "bad"
    assert f"no server answers at {url}" in found.found


def test_servers_of_ours_can_be_started_where_sglang_is_installed() -> None:
    assert checks(["rollout.backend=sglang"])["rollouts"] == ("rollouts", "ok", "SGLang can be started here")
    assert checks()["rollouts"].found == "the local sampler, in the trainer's process"
