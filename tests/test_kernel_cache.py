"""Compiled kernels on disk: a file that is damaged is compiled again, and stops nothing."""

from __future__ import annotations

import importlib
import os
import pickle
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import numba
import numpy as np
import pytest

from edge_dlf.fusion import ready
from edge_dlf.fusion.kernels import cache as caching
from edge_dlf.fusion.kernels import memory
from edge_dlf.fusion.kernels.cache import cache_folder, is_ready, kept
from edge_dlf.system.child import python_command

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")

VALUES = np.arange(10)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def kernel() -> Any:
    """A kernel as a new process has it: with nothing but what is kept on disk."""
    return kept(numba.njit(memory.read.py_func))


def is_found() -> bool:
    """Whether a new process finds the kernel on disk; it works in either case."""
    found = kernel()
    assert found(VALUES) == 45
    return bool(found.stats.cache_hits)


def zero(content: bytes, start: int, end: int) -> bytes:
    return content[:start] + bytes(end - start) + content[end:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "one byte": lambda content: content[:1],
    "cut": lambda content: content[:-1],
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "zeros amid it": lambda content: zero(content, len(content) // 2, len(content) // 2 + 64),
    "zeros at its end": lambda content: zero(content, len(content) - 16, len(content)),
    "a bit": lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:],
    "text": lambda _: b"No space left on device\n",
    "another pickle": lambda _: b"\x80\x04N.",
    "as many zeros as a checksum": lambda _: bytes(4),
    "another pickle with its checksum": lambda _: pickle.dumps(5) + zlib.crc32(pickle.dumps(5)).to_bytes(4, "big"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_file_is_compiled_again(cache: Path, kind: str, damage: Callable[[bytes], bytes]) -> None:
    assert not is_found()
    assert is_found()
    (file,) = cache.rglob(f"*.{kind}")
    file.write_bytes(damage(file.read_bytes()))
    assert not is_found()
    assert is_found()


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_file_takes_no_memory(cache: Path, kind: str) -> None:
    assert not is_found()
    (file,) = cache.rglob(f"*.{kind}")
    remembered_as = pickle.LONG_BINPUT + (1 << 24).to_bytes(4, "little")
    file.write_bytes(b"\x80\x04N" + remembered_as + b"." + file.read_bytes())
    tracemalloc.start()
    try:
        assert not is_found()
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["a pipe", "a device"])
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_what_never_ends_in_the_place_of_a_file_is_not_read(
    cache: Path, kind: str, make: Callable[[Path], object]
) -> None:
    assert not is_found()
    (file,) = cache.rglob(f"*.{kind}")
    file.unlink()
    make(file)
    assert not is_found()
    assert is_found()


def test_a_folder_in_the_place_of_a_file_stops_nothing(cache: Path) -> None:
    assert not is_found()
    for file in list(cache.rglob("*.nb?")):
        file.unlink()
        (file / "x").mkdir(parents=True)
    assert not is_found()


def test_files_of_another_machine_or_numba_are_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as other:
        other.setattr("numba.core.codegen.JITCPUCodegen.magic_tuple", lambda _: ("x", "another-cpu", "+none"))
        assert not is_found()
        assert is_found()
    assert not is_found()
    (index,) = cache.rglob("*.nbi")
    index.write_bytes(pickle.dumps("0.1") + index.read_bytes())
    assert not is_found()
    assert is_found()


def test_every_file_damaged_at_once(cache: Path) -> None:
    assert not is_found()
    for file in cache.rglob("*.nb?"):
        file.write_bytes(b"")
    assert not is_found()
    assert is_found()


def test_what_another_process_removes_meanwhile(cache: Path) -> None:
    assert not is_found()
    (index,) = cache.rglob("*.nbi")
    for file in cache.rglob("*.nbc"):
        file.unlink()
    assert index.exists()
    assert not is_found()
    assert is_found()


def test_a_full_disk_stops_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    assert not is_found()
    assert not is_found()


def test_no_folder_that_can_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    assert not is_found()
    assert cache_folder(kernel()) is None


def test_every_function_that_python_calls_keeps_its_files_this_way() -> None:
    from edge_dlf.fusion import dispatch, kernels
    from edge_dlf.fusion.kernels.cache import CheckedFile

    modules = [
        importlib.import_module(f"{kernels.__name__}.{module.name}") for module in iter_modules(kernels.__path__)
    ]
    compiled = {
        name: value
        for module in (*modules, dispatch)
        for name, value in vars(module).items()
        if hasattr(value, "py_func") and not value.targetoptions.get("no_cpython_wrapper")
    }
    assert {"read", "pick_rows", "search_rows", "_address"} <= compiled.keys()
    assert all(isinstance(value._cache._cache_file, CheckedFile) for value in compiled.values())


def test_a_kernel_of_other_sources_is_compiled_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_found()
    assert is_found()
    monkeypatch.setattr(caching, "_SOURCES", "what other files hold")
    assert not is_found()


def test_whether_another_process_could_compile_a_kernel(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_ready(kernel())
    assert kernel()(VALUES) == 45
    assert is_ready(kernel())
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    assert is_ready(kernel())  # it cannot be kept


@pytest.mark.parametrize(
    ("code", "n_cores", "n_started"),
    [
        ("print(flush=True)", 2, 1),
        ("raise SystemExit(1)", 2, 1),
        ("import os; os.kill(os.getpid(), 9)", 2, 1),
        ("print()", 1, 0),
    ],
)
def test_kernels_are_ready_however_the_other_process_ends(
    code: str, n_cores: int, n_started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def command(asked: str) -> list[str]:
        started.append(asked)
        return python_command(code)

    monkeypatch.setattr(ready, "is_ready", lambda _: False)
    monkeypatch.setattr(ready, "n_cores", lambda: n_cores)
    monkeypatch.setattr(ready, "python_command", command)
    ready.warm_up()
    assert len(started) == n_started


def test_what_the_other_process_does(capsys: pytest.CaptureFixture[str]) -> None:
    ready.compile_search()
    assert capsys.readouterr().out == "\n"
