"""The house: imports point down, files and functions stay short, the public face is fixed, and starting is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import edge_dlf

PACKAGE = Path(edge_dlf.__file__).parent
LEVELS = {
    "errors": 0,
    "params": 1,
    "system": 1,
    "gguf": 1,
    "fusion": 2,
    "engine": 3,
    "llama": 4,
    "families": 5,
    "answers": 5,
    "api": 6,
    "batch": 7,
    "server": 7,
    "evidence": 7,
    "cli": 8,
}
HELP = """from click.testing import CliRunner
from edge_dlf.cli import main
assert CliRunner().invoke(main, {!r}).exit_code == 0"""
MAY_IMPORT_LLAMA_CPP = {"llama"}
MAY_IMPORT_NUMBA = {"fusion"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that `path` imports, also inside functions and under TYPE_CHECKING."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    package = ["edge_dlf", *parts[:-1]]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            stem = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*stem, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_to_lower_levels(path: Path) -> None:
    if room(path) in ("__init__", "__main__"):
        return
    own = LEVELS[room(path)]
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "edge_dlf" and len(parts) > 1 and parts[1] in LEVELS and parts[1] != room(path):
            assert LEVELS[parts[1]] < own, f"{room(path)} (level {own}) imports {parts[1]} (level {LEVELS[parts[1]]})"


def test_files_do_not_import_each_other_in_a_circle() -> None:
    files = {".".join(["edge_dlf", *path.relative_to(PACKAGE).with_suffix("").parts]): path for path in modules()}
    files = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {
        name: {other for other in imported(path) & files.keys() if not f"{name}.".startswith(f"{other}.")}
        for name, path in files.items()
    }
    TopologicalSorter(graph).prepare()


def test_files_and_functions_are_short_and_the_rooms_are_few() -> None:
    for path in modules():
        text = path.read_text()
        assert len(text.splitlines()) <= 400, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{path}: {node.name}"
    entries = [path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "models")]
    assert sum(path.is_file() for path in entries) <= 6
    assert sum(path.is_dir() for path in entries) <= 11


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_llama_cpp_and_numba_have_one_importer_each(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert "llama_cpp" not in tops or room(path) in MAY_IMPORT_LLAMA_CPP
    assert not tops & {"numba", "llvmlite"} or room(path) in MAY_IMPORT_NUMBA


@pytest.mark.parametrize(
    "statement",
    [
        "import edge_dlf",
        "from edge_dlf import FusionParams, SamplingParams, EdgeDLFError",
        HELP.format(["--help"]),
        HELP.format(["chat", "--help"]),
        HELP.format(["list", "--help"]),
        HELP.format(["pull", "--help"]),
    ],
)
def test_starting_loads_no_heavy_library(statement: str) -> None:
    heavy = "{'numpy', 'numba', 'llama_cpp', 'huggingface_hub'}"
    check = f"import sys; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], check=True)


def test_the_public_face() -> None:
    assert set(edge_dlf.__all__) == {
        "CapacityError",
        "ContextOverflowError",
        "DecodeError",
        "DownloadError",
        "EdgeDLFError",
        "FamilyError",
        "FusedLlama",
        "FusionParams",
        "InvalidParameterError",
        "LoadError",
        "ModelFileError",
        "NonFiniteLogitsError",
        "OutOfMemoryError",
        "RequestInterruptedError",
        "SamplingParams",
        "Token",
        "VocabMismatchError",
        "fuse_logits",
        "search_alpha",
        "tune",
    }
    for name in edge_dlf.__all__:
        assert getattr(edge_dlf, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        edge_dlf.no_such_name  # noqa: B018


def test_every_error_is_drawn_in_the_tree_with_its_exit_code() -> None:
    from edge_dlf import errors

    lines = (errors.__doc__ or "").splitlines()
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert found < set(edge_dlf.__all__)
    for name in found:
        (line,) = [line for line in lines if name in line.split()]
        assert str(getattr(errors, name).exit_code) in line.split()
