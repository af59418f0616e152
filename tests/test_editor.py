"""The prompt of the chat, driven by keys, and the chat as a terminal sees it."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.data_structures import Size
from prompt_toolkit.document import Document
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput, Output
from prompt_toolkit.output.vt100 import Vt100_Output

from edge_dlf import DecodeError
from edge_dlf.cli.chat import converse
from edge_dlf.cli.commands import COMMANDS, LEAVE
from edge_dlf.cli.editor import Editor, _history, completer

from .fake_llm import FakeLlama, fake_session

UP, CTRL_A, CTRL_C, CTRL_D, ALT_ENTER, TAB = "\x1b[A", "\x01", "\x03", "\x04", "\x1b\r", "\t"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the history is kept."""
    monkeypatch.setattr(platformdirs, "user_state_dir", lambda *_, **__: str(tmp_path / "state"))
    return tmp_path / "state"


@contextmanager
def keyboard(*keys: str, output: Output | None = None) -> Iterator[PipeInput]:
    """A terminal on which these keys are pressed."""
    with create_pipe_input() as keys_input, create_app_session(keys_input, output or DummyOutput()):
        for key in keys:
            keys_input.send_text(key)
        yield keys_input


def typed(*keys: str, notes: list[str] | None = None) -> str:
    """What one `read` returns once these keys are pressed."""
    with keyboard(*keys):
        return Editor(["dynamic", "math"], (notes if notes is not None else []).append).read()


def pasted(text: str) -> str:
    """The keys by which a terminal tells a paste from what is typed."""
    return f"\x1b[200~{text}\x1b[201~"


class TestEditor:
    def test_a_terminal_of_one_column(self) -> None:
        screen = io.StringIO()
        output = Vt100_Output(screen, lambda: Size(rows=3, columns=1))
        with keyboard("some words", CTRL_A, TAB, "\r", output=output):
            assert Editor(["math"], print).read() == "some words"
        assert screen.getvalue()

    @pytest.mark.parametrize(
        ("keys", "text"),
        [
            (["Hi", "\r"], "Hi"),
            (["Hi", "\n"], "Hi"),
            (["one", ALT_ENTER, "two", "\r"], "one\ntwo"),
            (["one\\", "\r", "two", "\r"], "one\ntwo"),
            (['"""one', "\r", "\r", "/two", "\r", '"""', "\r"], "one\n\n/two"),
            (['"""/one"""', "\r"], "//one"),
            (["\x1b[200~one\r\ntwo\n\tthree\x1b[201~", "\r"], "one\ntwo\n\tthree"),
            ([pasted('"""Doc."""\nimport os'), "\r"], '"""Doc."""\nimport os'),
            ([pasted('"""Doc\r\n\r\nof two.\r\n"""\r\nx = """y"""\r\n'), "\r"], '"""Doc\n\nof two.\n"""\nx = """y"""'),
            ([pasted('"""not closed'), "\r"], '"""not closed'),
            ([pasted('    """indented"""\n    pass'), "\r"], '    """indented"""\n    pass'),
            ([pasted('"""Doc."""\npass'), " # why?", "\r"], '"""Doc."""\npass # why?'),
            (["why?", "\x01", pasted('"""Doc."""\n'), "\r"], '"""Doc."""\nwhy?'),
            ([pasted("/exit code 3\nin a log"), "\r"], "//exit code 3\nin a log"),
            ([pasted("/system of a down\r\nis a band"), "\r"], "//system of a down\nis a band"),
            ([pasted("/set temperature 0\n"), "\r"], "/set temperature 0\n"),
            ([pasted("/help"), "\r"], "/help"),
            (["see ", pasted('"""Doc."""\n/exit'), "\r"], 'see """Doc."""\n/exit'),
            ([pasted('"""'), "\r", pasted("/exit\nnow"), "\r", '"""', "\r"], "//exit\nnow"),
            (["a😀\x7fb", "\r"], "ab"),
            (["a", TAB, "\r"], "a"),
            (["an \x1b[31merror\x1b[0;1mat \x1b[1M!", "\r"], "an \x1b[31merror\x1b[0;1mat \x1b[1M!"),
            (["\x1b[M !!", "\x1b[<0;1M", "\x1b[<99;1;1m", "\r"], "\x1b[M !!\x1b[<0;1M\x1b[<99;1;1m"),
        ],
    )
    def test_keys(self, state: Path, keys: list[str], text: str) -> None:
        assert typed(*keys) == text

    def test_ctrl_d_and_ctrl_c(self, state: Path) -> None:
        with pytest.raises(EOFError):
            typed(CTRL_D)
        with keyboard("text", CTRL_C) as keys_input:
            editor = Editor([], print)
            with pytest.raises(KeyboardInterrupt):
                editor.read()
            assert not editor.was_empty
            keys_input.send_text(CTRL_C)
            with pytest.raises(KeyboardInterrupt):
                editor.read()
            assert editor.was_empty

    def test_ctrl_c_ends_a_paste_whose_end_was_lost(self, state: Path) -> None:
        with keyboard("\x1b[200~cut in the", CTRL_C) as keys_input:
            editor = Editor([], print)
            with pytest.raises(KeyboardInterrupt):
                editor.read()
            keys_input.send_text("Hi\r")
            assert editor.read() == "Hi"

    def test_history_is_kept_from_one_start_to_the_next(self, state: Path) -> None:
        typed("one", ALT_ENTER, "two", "\r")
        _history(print).append_string("bytes that are \udcff")
        assert typed(UP, UP, "\r") == "one\ntwo"
        assert stat.S_IMODE((state / "chat_history").stat().st_mode) == 0o600

    def test_a_paste_comes_back_from_the_history_as_the_text_that_it_was(self, state: Path) -> None:
        for text, read in (('"""Doc."""\npass', '"""Doc."""\npass'), ("/exit code\n3", "//exit code\n3")):
            assert typed(pasted(text), "\r") == typed(UP, "\r") == read

    def test_a_history_that_cannot_be_kept_is_a_note(self, state: Path) -> None:
        state.write_text("a file, not a folder")
        notes: list[str] = []
        assert typed("Hi", "\r", notes=notes) == "Hi"
        assert len(notes) == 1
        assert "the history cannot be kept" in notes[0]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("/s", ["/system", "/set", "/save", "/sessions", "/stats"]),
            ("/met", ["/method"]),
            ("/method ", ["dynamic", "math"]),
            ("/alpha o", ["on", "off"]),
            ("/set top", ["top_k", "top_p"]),
            ("", [f"/{name}" for name in (*COMMANDS, *LEAVE)]),
            ("sys", []),
            ("a /sys", []),
            ("/system\n/sys", []),
            ("/help ", []),
        ],
    )
    def test_completion(self, text: str, words: list[str]) -> None:
        completions = completer(["dynamic", "math"]).get_completions(Document(text), CompleteEvent())
        assert [completion.text for completion in completions] == words

    def test_completion_of_files(self, tmp_path: Path) -> None:
        (tmp_path / "chat.json").touch()
        (completion,) = completer([]).get_completions(Document(f"/load {tmp_path}/ch"), CompleteEvent())
        assert completion.text == "at.json"


class TestTerminal:
    def converse(self, llm: FakeLlama, *keys: str) -> int:
        with keyboard(*keys):
            return converse(fake_session(llm), Editor([], print))

    def test_talk_and_leave(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.converse(FakeLlama(), "Hi", "\r", CTRL_D) == 0
        captured = capsys.readouterr()
        assert captured.out == "ok\n"
        assert captured.err.startswith("fake · method dynamic · /help lists the commands\n")

    def test_exit(self, state: Path) -> None:
        assert self.converse(FakeLlama(), "/exit", "\r") == 0

    def test_a_pasted_text_that_looks_like_leaving_is_sent(self, state: Path) -> None:
        llm = FakeLlama()
        assert self.converse(llm, pasted("/exit code 3 means what?\nI saw it in a log."), "\r", CTRL_D) == 0
        assert llm.requests[0][0] == "user: /exit code 3 means what?\nI saw it in a log.\n"

    def test_an_error_is_one_line(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama([DecodeError("large\nfailed")])
        assert self.converse(llm, "Hi", "\r", "/set top-k -2", "\r", "Ho", "\r", CTRL_D) == 0
        lines = capsys.readouterr().err.splitlines()
        assert lines[1:3] == ["edge-dlf: large failed", "edge-dlf: top_k must be 0 or more, not -2"]
        assert llm.requests[-1][0] == "user: Ho\n"

    def test_two_ctrl_c_on_an_empty_line_leave(self, state: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.converse(FakeLlama(), CTRL_C, CTRL_C) == 130
        assert capsys.readouterr().err.endswith("Ctrl-C again leaves, as Ctrl-D does\n")

    def test_ctrl_c_elsewhere_does_not_count(self, state: Path) -> None:
        assert self.converse(FakeLlama(), CTRL_C, "text", CTRL_C, CTRL_C, "Hi", "\r", CTRL_C, CTRL_D) == 0
