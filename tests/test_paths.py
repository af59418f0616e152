"""Names that lead to no usable file, given to every command in every place where a file is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from edge_dlf import EdgeDLFError, FusedLlama
from edge_dlf.cli import main
from edge_dlf.cli.conversation import Conversation, load
from edge_dlf.cli.options import Options
from edge_dlf.families.manifest import Manifest
from edge_dlf.families.spec import FamilySpec

from .fake_llm import FakeLlama

LONG = "x" * 300
NAMES = [
    "~nosuch/a",
    LONG,
    f"{LONG}/a",
    "folder",
    "loop",
    "in.jsonl/below",
    "nowhere/a",
    "dangling/a",
    "zeros",
]
PLACES = {
    "family": ["generate", "hi", "-f", "PATH"],
    "grammar": ["generate", "hi", "-f", "FAMILY", "--grammar", "PATH"],
    "schema": ["generate", "hi", "-f", "FAMILY", "--json-schema", "PATH"],
    "trace": ["generate", "hi", "-f", "FAMILY", "--trace", "PATH"],
    "batch": ["batch", "PATH", "-f", "FAMILY", "-o", "out"],
    "batch-output": ["batch", "in.jsonl", "-f", "FAMILY", "-o", "PATH"],
    "batch-errors": ["batch", "in.jsonl", "-f", "FAMILY", "-o", "out", "--errors", "PATH"],
    "batch-trace": ["batch", "in.jsonl", "-f", "FAMILY", "-o", "out", "--trace", "PATH"],
    "compare": ["compare", "hi", "-f", "PATH"],
    "chat": ["chat", "PATH"],
    "tune": ["tune", "PATH"],
    "trace-file": ["trace", "PATH"],
    "bench": ["bench", "PATH"],
    "show": ["show", "PATH"],
    "pull": ["pull", "--offline", "PATH"],
    "rm": ["rm", "--yes", "PATH"],
    "new": ["new", "mine", "--large", "PATH", "--base", "PATH", "--expert", "a=PATH"],
    "serve": ["serve", "PATH", "--port", "0"],
    "doctor": ["doctor", "PATH"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDGE_DLF_MODELS", str(tmp_path / "models"))
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    Path("dangling").symlink_to("nowhere")
    Path("zeros").write_bytes(bytes(4096))
    Path("in.jsonl").write_text(json.dumps({"prompt": "hi"}) + "\n")
    monkeypatch.setattr(Options, "load", lambda _: FakeLlama())
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_one_line_and_the_exit_code_of_wrong_usage_or_of_a_model(folder: Path, tiny: Path, place: str) -> None:
    for name in NAMES:
        arguments = [part.replace("FAMILY", str(tiny)).replace("PATH", name) for part in PLACES[place]]
        result = CliRunner().invoke(main, arguments)
        assert isinstance(result.exception, SystemExit | None), (name, result.exception)
        if place == "doctor" and result.exit_code == 1:
            continue  # it says in its own lines what is wrong
        if place == "batch" and name == "zeros":
            assert result.exit_code == 1  # a row that is no JSON
            continue
        if name == "zeros" and result.exit_code == 0:
            assert place in ("trace-file", "grammar")  # a last line that is not whole is left out; a fake reads none
            continue
        assert result.exit_code in (2, 3), (name, result.stderr)
        complaints = [line for line in result.stderr.splitlines() if line.startswith(("edge-dlf:", "Error:"))]
        assert len(complaints) == 1, (name, result.stderr)


def test_a_pipe_is_input_and_no_place_for_a_trace(folder: Path, tiny: Path) -> None:
    os.mkfifo("fifo")
    result = CliRunner().invoke(main, ["generate", "hi", "-f", str(tiny), "--trace", "fifo"])
    assert (result.exit_code, result.stderr) == (2, "edge-dlf: fifo: is no regular file\n")
    result = CliRunner().invoke(main, ["show", "fifo"])
    assert result.exit_code == 3


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no such names")
def test_a_name_that_is_no_utf8(folder: Path, tiny: Path) -> None:
    name = os.fsdecode(b"inv\xff")
    Path(name).symlink_to(tiny / "large.gguf")
    files = ["--large", name, "--base", str(tiny / "base.gguf"), "--expert", f"a={tiny / 'tuned.gguf'}"]
    result = CliRunner().invoke(main, ["new", "mine", *files])
    complaint = "a family.toml is UTF-8, which the name of one of these files is not; rename the file"
    assert (result.exit_code, result.stderr) == (2, f"edge-dlf: {complaint}\n")
    assert not Path("models/mine").exists()
    manifest = Manifest({"large": [{"file": name, "bytes": 1, "digest": "a"}]}, {})
    manifest.save(Path("manifest"))
    assert Manifest.load(Path("manifest")) == manifest
    Path(f"{name}.jsonl").touch()
    assert CliRunner().invoke(main, ["trace", f"{name}.jsonl"]).exit_code == 0
    assert Path(f"{name}.html").read_bytes().decode("utf-8")


@pytest.mark.parametrize("name", ["~nosuch/a", LONG, "no\0thing", "folder", "loop"])
def test_from_python_it_is_an_error_of_the_documented_kind(folder: Path, name: str) -> None:
    with pytest.raises(EdgeDLFError):
        FamilySpec.load(name)
    with pytest.raises(EdgeDLFError):
        FusedLlama(name, name, {"a": name})
    with pytest.raises(EdgeDLFError):
        load(Path(name))
    if name != "loop":
        with pytest.raises(EdgeDLFError):
            Conversation().save(Path(name), "fake", {})


@pytest.mark.parametrize("path", ["no\\u0000thing", "~nosuch/a", LONG, "folder", "loop"])
def test_a_family_that_names_such_a_file(folder: Path, path: str) -> None:
    text = f'name = "f"\n[large]\npath = "{path}"\n[base]\npath = "{path}"\n[[experts]]\nname = "a"\nlora = "{path}"\n'
    Path("folder/family.toml").write_text(text)
    for command in (["generate", "hi", "-f", "folder"], ["show", "folder"], ["list"], ["pull", "--offline", "folder"]):
        result = CliRunner().invoke(main, command)
        assert isinstance(result.exception, SystemExit | None), (command, result.exception)
        assert result.stderr.count("edge-dlf:") <= 1


def test_a_user_without_a_name_and_a_home(folder: Path, tiny: Path) -> None:
    """As in a container that runs under a number of its own: nothing can be kept, and everything works."""
    program = (
        "import pwd, sys\n"
        "def getpwuid(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = getpwuid\n"
        "from edge_dlf.cli import main\n"
        "main(sys.argv[1:])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "HOME" and not name.startswith("XDG_")}
    environment.pop("EDGE_DLF_MODELS", None)
    for arguments, code in {("list",): 0, ("chat", str(tiny), "--max-tokens", "2"): 0, ("show", "nope"): 3}.items():
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            input="Hi\n", capture_output=True, text=True, env=environment, timeout=120,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("Traceback")) == (code, 0), done.stderr
    assert not any(folder.glob("~*"))
