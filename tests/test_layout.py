"""The three packages import each other in one direction only, and their folders stay folders."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "tempo_kernels": ROOT / "kernels" / "tempo_kernels",
    "tempo_engine": ROOT / "engine" / "tempo_engine",
    "tempo_em": ROOT / "tempo" / "tempo_em",
}
MAY_IMPORT = {
    "tempo_kernels": {"tempo_kernels"},
    "tempo_engine": {"tempo_kernels", "tempo_engine"},
    "tempo_em": {"tempo_kernels", "tempo_engine", "tempo_em"},
}


def imported_packages(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names & set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        assert imported_packages(file) <= MAY_IMPORT[package], f"{file} imports against the direction"


def test_no_init_file_hides_the_packages_that_others_call_kernels_or_engine() -> None:
    for folder in ("engine", "kernels", "tempo"):
        assert not (ROOT / folder / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_nothing_evaluates_or_unpickles_untrusted_input() -> None:
    forbidden = re.compile(
        r"(?<![\w.])(eval|exec)\(|\bpickle\.load|Unpickler|torch\.load\((?!.*weights_only=True)|trust_remote_code=True|yaml\.load\("
    )
    for folder in PACKAGES.values():
        for file in folder.rglob("*.py"):
            code = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if '"""' not in line)
            found = [m.group() for m in forbidden.finditer(code)]
            assert not found, f"{file}: {found}"


def test_pickles_are_written_for_servers_of_our_own_only() -> None:
    writers = [f.name for folder in PACKAGES.values() for f in folder.rglob("*.py") if "import pickle" in f.read_text()]
    assert writers == ["weight_sync.py"]
