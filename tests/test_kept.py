"""Conversations that a chat keeps by itself: going on with them, their list, and what happens to their files."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Any

import platformdirs
import pytest
from click.testing import CliRunner, Result

from edge_dlf import EdgeDLFError, InvalidParameterError
from edge_dlf.cli import main
from edge_dlf.cli.chat import go_on, handle
from edge_dlf.cli.kept import N_KEPT, Kept
from edge_dlf.cli.options import Options
from edge_dlf.cli.session import Session

from .fake_llm import FakeLlama, fake_session


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder."""
    monkeypatch.setattr(platformdirs, "user_data_dir", lambda *_, **__: str(tmp_path / "data"))
    return tmp_path / "data" / "chats"


def chat(*lines: str, llm: FakeLlama | None = None, **given: Any) -> Session:
    """A chat that keeps its conversation, after these lines."""
    session = fake_session(llm := llm or FakeLlama(), **given)
    session.kept = Kept(llm.name, session.screen.say)
    for line in lines:
        assert handle(session, line)
    return session


def continued(**given: Any) -> Session:
    session = chat(**given)
    go_on(session)
    return session


class TestContinue:
    def test_the_last_conversation_goes_on_with_its_settings(self, data: Path) -> None:
        chat("old", "/clear", "Hi", "/set seed 3", system="S")
        session = continued(settings={"top_k": 5})
        handle(session, "Ho")
        assert session.llm.requests[-1][0] == "system: S\nuser: Hi\nassistant: ok\nuser: Ho\n"
        assert session.settings == {"seed": 3, "top_k": 5}
        assert len([*data.rglob("*.json")]) == 2

    def test_what_is_typed_goes_before_what_was_kept(self) -> None:
        chat("Hi", settings={"seed": 3}, system="S")
        session = continued(settings={"seed": 4}, system="other")
        assert session.settings == {"seed": 4}
        assert session.conversation.system == "other"

    def test_only_of_the_same_family(self, capsys: pytest.CaptureFixture[str]) -> None:
        chat("Hi", llm=FakeLlama(name="other"))
        assert not continued().conversation.messages
        assert "no conversation with fake is kept yet" in capsys.readouterr().err

    def test_the_one_in_which_something_was_said_last(self) -> None:
        chat("first", "/clear", "second", "/sessions 1", "again")
        assert [m["content"] for m in continued().conversation.messages] == ["first", "ok", "again", "ok"]

    @pytest.mark.parametrize("damage", [b"", b"\xff{", b"[" * 10**5, b"{}"])
    def test_a_damaged_file_is_told_and_passed_over(
        self, data: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        session = chat("good", "/clear", "bad")
        assert session.kept
        assert session.kept.path
        session.kept.path.write_bytes(damage)
        assert continued().conversation.messages[0]["content"] == "good"
        assert "cannot be read" in capsys.readouterr().err

    def test_settings_that_no_longer_fit_are_left_out(self, capsys: pytest.CaptureFixture[str]) -> None:
        chat("Hi", "/method math")
        session = continued(llm=FakeLlama(experts=["code"]), settings={"seed": 1})
        assert session.settings == {"seed": 1}
        assert session.conversation.messages
        assert "note: its settings are left out (method must be one of" in capsys.readouterr().err

    @pytest.fixture
    def pipe(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def pipe(stdin: str, *args: str) -> Result:
            monkeypatch.setattr(Options, "load", lambda _: FakeLlama())
            files = ["--large", "l.gguf", "--base", "b.gguf", "--expert", "math=e.gguf"]
            return CliRunner().invoke(main, ["chat", *files, *args], input=stdin)

        return pipe

    def test_a_pipe_keeps_nothing_unless_it_is_asked_to(self, pipe: Any, data: Path) -> None:
        assert pipe("one\n").exit_code == 0
        assert not data.exists()
        assert pipe("one\n", "--continue").exit_code == 0
        assert pipe("two\n", "-c").exit_code == 0
        (kept,) = data.rglob("*.json")
        assert [m["content"] for m in json.loads(kept.read_bytes())["messages"]] == ["one", "ok", "two", "ok"]


class TestSessions:
    def test_the_list(self, capsys: pytest.CaptureFixture[str]) -> None:
        chat("/sessions", "first\x1b[2J", "/clear", "second", "third", "/sessions")
        text = capsys.readouterr().err
        assert text.startswith("no conversation is kept yet\n")
        assert re.search(r"^  1  2\d\d\d-\d\d-\d\d \d\d:\d\d  2 messages: first\ufffd\[2J$", text, re.MULTILINE)
        assert re.search(r"^  2\* 2.*  4 messages: second$", text, re.MULTILINE)

    def test_a_damaged_file_is_in_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        session = chat("Hi")
        assert session.kept
        session.kept.files()[0].write_text("{")
        handle(session, "/sessions")
        assert "cannot be read (not valid JSON" in capsys.readouterr().err
        with pytest.raises(EdgeDLFError, match="cannot be read"):
            handle(session, "/sessions 1")

    @pytest.mark.parametrize("number", ["0", "2", "-1", "x", "²", "9" * 5000])
    def test_a_number_that_is_not_in_it(self, number: str) -> None:
        session = chat("Hi")
        with pytest.raises(InvalidParameterError, match="there is no conversation"):
            handle(session, f"/sessions {number}")
        assert session.conversation.messages

    def test_a_chat_that_keeps_none(self) -> None:
        with pytest.raises(InvalidParameterError, match="keeps no conversations"):
            handle(fake_session(FakeLlama()), "/sessions")


class TestFiles:
    def test_only_the_owner_can_read_them(self, data: Path) -> None:
        chat("Hi")
        (kept,) = data.rglob("*.json")
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(data.stat().st_mode) == 0o700

    def test_what_was_forgotten_leaves_the_file(self, data: Path) -> None:
        chat("Hi", "secret", "/undo")
        assert "secret" not in next(data.rglob("*.json")).read_text()
        session = continued()
        handle(session, "/undo")
        assert not [*data.rglob("*.json")]

    def test_the_oldest_ones_go(self, data: Path) -> None:
        session = chat("0")
        assert session.kept
        for n in range(1, N_KEPT):
            (session.kept.folder / f"20990101-{n:06}-x.json").write_text("{}")
        handle(session, "/clear")
        handle(session, "new")
        kept = session.kept.files()
        assert len(kept) == N_KEPT
        assert "0" not in [json.loads(path.read_text()).get("messages", [{}])[0].get("content") for path in kept]

    def test_two_chats_over_one_conversation_lose_nothing(self, data: Path) -> None:
        chat("Hi")
        one, other = continued(), continued()
        handle(one, "one")
        handle(other, "other")
        handle(one, "more")
        said = [[m["content"] for m in json.loads(path.read_bytes())["messages"]] for path in data.rglob("*.json")]
        assert sorted(said) == [["Hi", "ok", "one", "ok", "more", "ok"], ["Hi", "ok", "other", "ok"]]

    def test_a_conversation_that_cannot_be_kept_goes_on(self, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data.parent.mkdir(exist_ok=True)
        data.write_text("a file in the place of the folder")
        session = chat("Hi", "Ho")
        assert len(session.conversation.messages) == 4
        assert capsys.readouterr().err.count("note: this conversation cannot be kept (") == 1

    def test_an_answer_that_was_cut_off_is_kept(self, data: Path) -> None:
        with pytest.raises(SystemExit):
            chat("Hi", llm=FakeLlama(["par", SystemExit(143)]))
        assert [m["content"] for m in continued().conversation.messages] == ["Hi", "par"]

    @pytest.mark.parametrize("name", [".", "..", "a/b", "ä (1)", "..x"])
    def test_names_of_any_family(self, data: Path, name: str) -> None:
        chat("Hi", llm=FakeLlama(name=name))
        (kept,) = data.rglob("*.json")
        assert kept.parent.parent == data
        assert continued(llm=FakeLlama(name=name)).conversation.messages
