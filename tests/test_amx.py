"""AMX kernels are used where a try shows that they are right, and the try is made once a build."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from edge_dlf.llama import amx
from edge_dlf.system.paths import shipped_dir

MODEL = shipped_dir() / "demo" / "base-q8_0.gguf"


@pytest.fixture(autouse=True)
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build that says it has AMX, an empty memory; returns the file of what is remembered."""
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path))
    monkeypatch.setattr(amx.lib, "llama_print_system_info", lambda: b"CPU : AVX512 = 1 | AMX_INT8 = 1 | ")
    return tmp_path / "amx.json"


def crashes() -> bool:
    """The answer of a new process."""
    return amx.amx_crashes.__wrapped__()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('right')", False),
        ("print('wrong')", True),
        ("import os; os.kill(os.getpid(), 11)", True),
        ("raise SystemExit('no such model')", True),
    ],
)
def test_a_try_decides_and_is_remembered(
    build: Path, monkeypatch: pytest.MonkeyPatch, code: str, expected: bool
) -> None:
    monkeypatch.setattr(amx, "_TRY", code)
    assert crashes() == expected
    monkeypatch.setattr(amx, "_try", lambda _: pytest.fail("tried twice"))
    assert crashes() == expected
    assert build.exists()


def test_another_build_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "_try", lambda _: "exit code -11")
    assert crashes()
    monkeypatch.setattr(amx.lib, "llama_print_system_info", lambda: b"CPU : AMX_INT8 = 1 | REPACK = 1 | ")
    monkeypatch.setattr(amx, "_try", lambda _: "right")
    assert not crashes()


def test_a_try_that_hangs_is_not_remembered(build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "_TRY", "import threading; threading.Event().wait()")
    monkeypatch.setattr(amx, "_PATIENCE_S", 0.2)
    assert crashes()
    assert not build.exists()


def test_a_build_without_amx_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx.lib, "llama_print_system_info", lambda: b"CPU : AVX512 = 1")
    monkeypatch.setattr(amx, "_try", lambda _: pytest.fail("tried"))
    assert not crashes()


def test_the_try_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this build: it is right, or it crashes, which only kernels of AMX can. What lies in place of the tiles'
    configuration decides which fault it is."""
    monkeypatch.undo()
    has_amx = b"AMX_INT8 = 1" in amx.lib.llama_print_system_info()
    faults = [f"exit code {-fault}" for fault in (signal.SIGSEGV, signal.SIGILL)]
    assert amx._try(MODEL) in ["right", *(faults if has_amx else [])]
