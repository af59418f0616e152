"""Files of the user that stand where a command would write its own: they stay."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_dlf import EdgeDLFError, InvalidParameterError
from edge_dlf.answers.trace_entry import answer_entry
from edge_dlf.cli import main
from edge_dlf.cli.conversation import Conversation, load
from edge_dlf.evidence.trace import TraceFile
from edge_dlf.system.durable import replacing

MINE = b"<!doctype html>\n<title>my notes</title>\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with TraceFile(Path("notes.jsonl")) as file:
        file.write(answer_entry("q", "f", "dynamic", ("math",), 2.0))
    return tmp_path


def trace(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["trace", "notes.jsonl", *arguments])


class TestTracePage:
    @pytest.mark.parametrize("name", ["notes.html", "other.html"])
    def test_a_page_that_is_not_its_own_stays(self, folder: Path, name: str) -> None:
        Path(name).write_bytes(MINE)
        result = trace(*([] if name == "notes.html" else ["-o", name]))
        assert (result.exit_code, result.stdout) == (2, "")
        assert (
            result.stderr == f"edge-dlf: {name}: is another file, no page of a trace, and stays; choose another name\n"
        )
        assert Path(name).read_bytes() == MINE

    def test_its_own_page_is_made_anew(self, folder: Path) -> None:
        assert trace().exit_code == 0
        before = Path("notes.html").read_bytes()
        assert trace().exit_code == 0
        assert Path("notes.html").read_bytes() == before

    def test_an_empty_file_is_nobodys(self, folder: Path) -> None:
        Path("notes.html").touch()
        assert trace().exit_code == 0

    @pytest.mark.parametrize("make", [os.symlink, os.link])
    def test_a_link_to_a_file_of_mine(self, folder: Path, make: object) -> None:
        Path("mine.html").write_bytes(MINE)
        make("mine.html", "notes.html")  # type: ignore[operator]
        assert trace().exit_code == 2
        assert Path("mine.html").read_bytes() == MINE

    def test_a_link_to_its_own_page_stays_a_link(self, folder: Path) -> None:
        Path("notes.html").symlink_to("page.html")
        for _ in range(2):
            assert trace().exit_code == 0
            assert Path("notes.html").is_symlink()
            assert b"edge-dlf trace</title>" in Path("page.html").read_bytes()

    def test_a_device_stays_a_device(self, folder: Path) -> None:
        before = Path("/dev/null").stat()
        assert trace("-o", "/dev/null").exit_code == 0
        assert os.path.samestat(before, Path("/dev/null").stat())

    def test_a_model_is_no_place_for_a_trace(self, folder: Path) -> None:
        Path("model.gguf").write_bytes(b"GGUF\3\0\0\0")
        with pytest.raises(InvalidParameterError, match="is not of a trace"):
            TraceFile(Path("model.gguf"))
        assert Path("model.gguf").read_bytes() == b"GGUF\3\0\0\0"


class TestSavedChat:
    def test_a_file_that_is_no_chat_stays(self, tmp_path: Path) -> None:
        for content in (b"GGUF\3\0\0\0", b'{"messages": []}', b'name = "family"\n'):
            file = tmp_path / "file"
            file.write_bytes(content)
            with pytest.raises(EdgeDLFError, match="is another file, no saved conversation, and stays"):
                Conversation().save(file, "fake", {})
            assert file.read_bytes() == content

    def test_a_chat_is_saved_over_a_chat(self, tmp_path: Path) -> None:
        file = tmp_path / "chat.json"
        Conversation().save(file, "fake", {})
        Conversation("Be brief.").save(file, "fake", {})
        assert load(file)[0].system == "Be brief."


def test_replacing_writes_into_a_pipe(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with replacing(Path(f"/dev/fd/{writer}")) as file:
        file.write(json.dumps({}).encode())
    os.close(writer)
    with os.fdopen(reader) as file_read:
        assert file_read.read() == "{}"
