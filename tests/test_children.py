"""Processes of our own import nothing from the folder that the user works in, whatever files lie there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edge_dlf.answers.forms import Forms
from edge_dlf.answers.sandbox import TemplateProcess
from edge_dlf.families import guard
from edge_dlf.fusion import ready
from edge_dlf.llama import amx
from edge_dlf.system.child import python_command
from edge_dlf.system.paths import shipped_dir

NAMES = (
    "json",
    "types",
    "enum",
    "re",
    "select",
    "signal",
    "numpy",
    "psutil",
    "jinja2",
    "llguidance",
    "resource",
    "llama_cpp",
    "edge_dlf",
)


@pytest.fixture(params=["absent", "empty", "absolute"])
def trap(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, full of modules that raise; it is not on sys.path, or there in one of two ways."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("open('ran', 'a').close()\nraise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    entries = {"absent": [], "empty": [""], "absolute": [str(tmp_path)]}[request.param]
    monkeypatch.setattr(sys, "path", [*entries, *sys.path])
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    return tmp_path


def test_the_process_of_a_chat_template(trap: Path) -> None:
    template = TemplateProcess("{{ messages[0].content }}")
    try:
        assert template.render([{"role": "user", "content": "Hello"}], {}, {}) == "Hello"
    finally:
        template.close()
    assert not (trap / "ran").exists()


def test_the_processes_that_keep_answers_to_their_forms(trap: Path) -> None:
    forms = Forms([*(bytes([byte]) for byte in range(256)), b""], [256])
    try:
        assert forms.grammar('root ::= "ab"').banned([97], 98, None) is None
    finally:
        forms.close()
    assert not (trap / "ran").exists()


def test_the_process_that_tries_a_model(trap: Path, tiny: Path) -> None:
    found = guard.try_model([tiny / "base.gguf"], [(tiny / "lora.gguf", 1.0)], n_gpu_layers=0)
    assert found.ok, found.reason
    assert not (trap / "ran").exists()


def test_the_process_that_tries_amx(trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amx, "_TRY", "import json, sys, numpy, llama_cpp\nprint(sys.argv[1])")
    model = shipped_dir() / "demo" / "base-q8_0.gguf"
    assert amx._try(model) == str(model)
    assert not (trap / "ran").exists()


def test_the_process_that_compiles_kernels(trap: Path) -> None:
    done = subprocess.run(python_command(ready._COMPILE), capture_output=True, text=True)
    assert done.stdout == "\n", done.stderr
    assert not (trap / "ran").exists()


def test_a_folder_that_was_removed_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    done = subprocess.run(python_command("import numpy, sys; print(sys.argv[1:])", "a"), capture_output=True, text=True)
    assert done.stdout == "['a']\n", done.stderr


def test_no_process_is_started_in_another_way() -> None:
    """Whoever starts a Python asks `python_command` for it."""
    package = Path(guard.__file__).parents[1]
    users = [path for path in package.rglob("*.py") if "sys.executable, " in path.read_text()]
    assert users == [package / "system" / "child.py"]
