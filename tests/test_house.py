"""The house: imports point down, the public face is what it says, and starting is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edge_dlf

PACKAGE = Path(edge_dlf.__file__).parent
LEVELS = {
    "errors": 0,
    "ids": 0,
    "jsonl": 0,
    "kernels": 0,
    "hub_cache": 1,
    "hub": 2,
    "params": 1,
    "durable": 1,
    "intake": 1,
    "fusion": 2,
    "ledger": 2,
    "family": 2,
    "backend": 2,
    "constraint": 1,
    "text": 2,
    "sandbox": 1,
    "template": 2,
    "remembered": 0,
    "lanes": 0,
    "overlap": 4,
    "gguf_texts": 0,
    "gguf_header": 2,
    "gguf_rules": 3,
    "gguf": 5,
    "llama": 3,
    "ensemble": 3,
    "explain": 3,
    "draft": 3,
    "pace": 2,
    "generation": 4,
    "picker": 5,
    "speculation": 6,
    "decode": 7,
    "scheduler": 8,
    "files": 8,
    "footprint": 8,
    "manifest": 9,
    "guard": 8,
    "catalogue": 3,
    "describe": 10,
    "library": 9,
    "machine": 0,
    "plan": 9,
    "members": 10,
    "tokenizer": 9,
    "stream": 9,
    "scoring": 9,
    "trace": 2,
    "trace_page": 3,
    "completion": 10,
    "preparer": 11,
    "requests": 2,
    "batch": 11,
    "doctor": 11,
    "api": 12,
    "bench": 13,
    "ray_worker": 13,
    "harness": 13,
    "stats": 0,
    "tasks": 0,
    "evaluate": 14,
    "ray_batch": 14,
    "server": 13,
    "cli": 15,
}
HELP = """from click.testing import CliRunner
from edge_dlf.cli import main
assert CliRunner().invoke(main, {!r}).exit_code == 0"""
MAY_IMPORT_LLAMA_CPP = {"llama"}
MAY_IMPORT_NUMBA = {"kernels"}


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


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_llama_cpp_and_numba_have_one_importer_each(path: Path) -> None:
    tops = {name.split(".")[0] for name in imported(path)}
    assert "llama_cpp" not in tops or room(path) in MAY_IMPORT_LLAMA_CPP
    assert not tops & {"numba", "llvmlite"} or room(path) in MAY_IMPORT_NUMBA


@pytest.mark.parametrize(
    "statement",
    [
        "import edge_dlf",
        "from edge_dlf import FusionParams, SamplingParams, Token, EdgeDLFError",
        HELP.format(["--help"]),
        HELP.format(["chat", "--help"]),
        HELP.format(["list", "--help"]),
        HELP.format(["pull", "--help"]),
    ],
)
def test_starting_loads_no_heavy_library(statement: str) -> None:
    heavy = "{'numba', 'llama_cpp', 'huggingface_hub'}"
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
    }
    for name in edge_dlf.__all__:
        assert getattr(edge_dlf, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        edge_dlf.no_such_name  # noqa: B018


def test_every_error_is_drawn_in_the_tree_with_its_exit_code() -> None:
    from edge_dlf import errors

    lines = (errors.__doc__ or "").splitlines()
    for name in errors.__all__:
        (line,) = [line for line in lines if name in line.split()]
        assert str(getattr(errors, name).exit_code) in line.split()
