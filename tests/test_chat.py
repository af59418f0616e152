"""The chat: what is said, its commands, its files, its colours, and how it behaves in a pipe."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.color import ColorSystem

from edge_dlf import ContextOverflowError, DecodeError, EdgeDLFError, InvalidParameterError, Token
from edge_dlf.answers.template import MemberPrompts
from edge_dlf.cli import main
from edge_dlf.cli.chat import handle
from edge_dlf.cli.commands import COMMANDS
from edge_dlf.cli.conversation import Conversation, load
from edge_dlf.cli.options import Options
from edge_dlf.cli.paint import AlphaPaint
from edge_dlf.cli.screen import printable
from edge_dlf.cli.session import Session
from edge_dlf.system import jsonl

from .fake_llm import FakeLlama, fake_session


def say(session: Session, *lines: str) -> None:
    for line in lines:
        assert handle(session, line)


class TestConversation:
    def test_what_was_said_is_sent_again(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama(["He", "llo"], ["Fine"])
        say(fake_session(llm, system="Be nice."), "Hi", "How are you?")
        assert llm.requests[1][0] == "system: Be nice.\nuser: Hi\nassistant: Hello\nuser: How are you?\n"
        assert capsys.readouterr().out == "Hello\nFine\n"

    def test_blank_lines_are_not_sent(self) -> None:
        llm = FakeLlama()
        say(fake_session(llm), "", "  ", "\n")
        assert not llm.requests

    def test_two_slashes_send_one(self) -> None:
        llm = FakeLlama()
        say(fake_session(llm), "//etc is a folder")
        assert llm.requests[0][0] == "user: /etc is a folder\n"

    def test_ctrl_c_keeps_the_partial_answer(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama(["one", " two", KeyboardInterrupt()])
        say(fake_session(llm), "Count", "Go on")
        assert llm.requests[1][0] == "user: Count\nassistant: one two\nuser: Go on\n"
        captured = capsys.readouterr()
        assert captured.out.startswith("one two\n")
        assert captured.err.startswith("stopped · 10.0 tokens/s")

    def test_ctrl_c_before_an_answer_leaves_the_message_to_retry_or_replace(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        llm = FakeLlama([KeyboardInterrupt()], ["yes"], [KeyboardInterrupt()])
        session = fake_session(llm)
        say(session, "Hi", "/retry", "Not this", "But this")
        assert [prompt for prompt, _ in llm.requests] == [
            "user: Hi\n",
            "user: Hi\n",
            "user: Hi\nassistant: yes\nuser: Not this\n",
            "user: Hi\nassistant: yes\nuser: But this\n",
        ]
        assert "stopped before an answer began; /retry asks again\n" in capsys.readouterr().err

    def test_an_error_keeps_what_had_come(self) -> None:
        llm = FakeLlama(["par", DecodeError("large failed")])
        session = fake_session(llm)
        with pytest.raises(DecodeError):
            say(session, "Hi")
        assert session.conversation.messages[-1] == {"role": "assistant", "content": "par"}

    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_thinking_is_dim_on_a_terminal_and_never_sent_again(
        self, is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
        thoughts = [Token(n, "", -0.5, 0.0, None, reasoning=text) for n, text in enumerate(["Hm", "."])]
        llm = FakeLlama([*thoughts, "Hello", " you"], thoughts, ["Fine"])
        say(fake_session(llm), "/set think on", "Hi", "Again?", "How are you?")
        assert llm.requests[0][1]["think"] == "on"
        assert llm.requests[2][0] == "user: Hi\nassistant: Hello you\nuser: How are you?\n"
        dim = "\x1b[2mHm\x1b[0m\x1b[2m.\x1b[0m\n" if is_terminal else ""
        assert capsys.readouterr().out == f"{dim}Hello you\n{dim}Fine\n"

    def test_an_empty_answer(self, capsys: pytest.CaptureFixture[str]) -> None:
        session = fake_session(FakeLlama([]))
        say(session, "Hi")
        assert capsys.readouterr().err == "an empty answer; /retry asks again\n"
        assert session.conversation.is_unanswered

    def test_one_line_of_figures_after_an_answer(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama([("a", 1.0, "math"), ("b", 0.5, "code"), "c", ("d", 0.5, "math")], experts=["math", "code"])
        say(fake_session(llm), "Hi")
        assert capsys.readouterr().err == "10.0 tokens/s · mean α 0.50 · math 50% · code 25%\n"

    def test_text_cannot_steer_the_terminal(self) -> None:
        assert printable("a\x1b[2Jb\x07\r\n\tc\x9b é 😀") == "a\ufffd[2Jb\ufffd\n\tc\ufffd é 😀"


class TestContext:
    def test_the_oldest_turns_leave_a_full_context(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama(*[["a" * 20]] * 9, n_ctx=200)
        session = fake_session(llm, system="SYSTEM", settings={"max_tokens": 10})
        say(session, *(f"message {k}" for k in range(5)))
        prompt = llm.requests[-1][0]
        assert prompt.startswith("system: SYSTEM\nuser: message ")
        assert prompt.endswith("user: message 4\n")
        assert len(prompt) <= 150
        assert prompt.count("user: ") == 3
        note = "note: the context of 200 tokens is full: dropped the oldest 2 turns\n"
        assert capsys.readouterr().err.count(note) == 1
        assert len(session.conversation.messages) == 10

    def test_a_message_too_long_is_one_error_and_the_chat_goes_on(self) -> None:
        llm = FakeLlama(n_ctx=100)
        session = fake_session(llm)
        say(session, "Hi")
        with pytest.raises(ContextOverflowError, match=r"needs 107 tokens .* answer up to 25: .* context of 100"):
            say(session, "x" * 100)
        say(session, "Short")
        assert llm.requests[-1][0] == "user: Hi\nassistant: ok\nuser: Short\n"

    def test_room_for_max_tokens(self) -> None:
        llm = FakeLlama(n_ctx=100)
        session = fake_session(llm, settings={"max_tokens": 80})
        say(session, "1", "2")
        assert [prompt for prompt, _ in llm.requests] == ["user: 1\n", "user: 2\n"]

    @pytest.mark.parametrize("max_tokens", [80, 100, 10**6])
    def test_max_tokens_beyond_the_context_is_cut(self, max_tokens: int, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama(["x"] * 99, ["y"], n_ctx=100)
        session = fake_session(llm, settings={"max_tokens": max_tokens})
        say(session, "a message that takes 40 tokens.....", "next")
        assert len(session.conversation.messages[1]["content"]) == 100 - len(llm.requests[0][0])
        assert "cut short: the context of 100 tokens is full" in capsys.readouterr().err

    def test_minus_one_is_what_llama_cpp_takes_it_for(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama()
        say(fake_session(llm), "/set seed -1", "/set max_tokens -1", "/set top_k -1", "/set top_p 0", "Hi")
        assert llm.requests[0][1] == {"seed": None, "top_k": 0, "top_p": 0.0}
        assert "seed none (set)" in capsys.readouterr().err

    def test_an_answer_that_reaches_the_end_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        say(fake_session(FakeLlama(["x"] * 99, n_ctx=20)), "Hi")
        assert capsys.readouterr().err.startswith("cut short: the context of 20 tokens is full · ")

    def test_undo_into_dropped_turns(self) -> None:
        conversation = Conversation(None, [{"role": r, "content": "x"} for r in ("user", "assistant") * 2], n_dropped=4)
        conversation.undo()
        assert conversation.n_dropped == 2

    def test_many_turns_cost_few_tokenizations(self) -> None:
        messages = [{"role": role, "content": "x"} for role in ("user", "assistant") * 500]
        conversation = Conversation(None, [*messages, {"role": "user", "content": "x"}])
        calls = 0

        def tokenize(visible: Any) -> MemberPrompts:
            nonlocal calls
            calls += 1
            return MemberPrompts([0] * len(visible))

        assert len(conversation.fit(tokenize, 100, 10)) == 75
        assert calls < 20


class TestCommands:
    def test_leave(self) -> None:
        for line in ("/exit", "/quit", "/bye", "/exit now"):
            assert not handle(fake_session(FakeLlama()), line)

    @pytest.mark.parametrize("line", ["/nope", "/", "/ hello", "/home/user/file is what?"])
    def test_an_unknown_command_is_one_line_and_sends_nothing(
        self, line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        llm = FakeLlama()
        say(fake_session(llm), line)
        assert capsys.readouterr().err.startswith("unknown command /")
        assert not llm.requests

    def test_help_names_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        say(fake_session(FakeLlama()), "/help")
        text = capsys.readouterr().err
        assert all(f"/{name}" in text for name in (*COMMANDS, "exit"))

    def test_system(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama()
        say(fake_session(llm), "/system", "/system Be\nbrief.", "Hi", '/system ""', "Ho")
        assert llm.requests[0][0] == "system: Be\nbrief.\nuser: Hi\n"
        assert llm.requests[1][0] == "user: Hi\nassistant: ok\nuser: Ho\n"
        assert capsys.readouterr().err.startswith("system prompt: none\nsystem prompt: Be")

    def test_clear_keeps_the_system_prompt(self) -> None:
        llm = FakeLlama()
        say(fake_session(llm, system="S"), "Hi", "/clear", "Ho")
        assert llm.requests[-1][0] == "system: S\nuser: Ho\n"

    def test_undo(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama()
        say(fake_session(llm), "One", "Two", "/undo", "Three", "/undo", "/undo", "/undo")
        assert llm.requests[-1][0] == "user: One\nassistant: ok\nuser: Three\n"
        assert "forgot: Two\n" in (err := capsys.readouterr().err)
        assert err.endswith("forgot: Three\nforgot: One\nthere is nothing to undo\n")

    def test_retry(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama(["a"], ["b"], ["c"])
        say(fake_session(llm), "/retry", "Hi", "/retry", "Ho")
        assert capsys.readouterr().err.startswith("there is nothing to retry\n")
        assert llm.requests[1][0] == "user: Hi\n"
        assert llm.requests[2][0] == "user: Hi\nassistant: b\nuser: Ho\n"

    def test_method(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama()
        session = fake_session(llm, defaults={"method": "static"})
        say(session, "/method", "/method math", "Hi")
        lines = capsys.readouterr().err.splitlines()
        assert lines[:2] == ["method: static (of dynamic, static, blend, weighted, large, base, math)", "method: math"]
        assert llm.requests[0][1] == {"method": "math"}
        with pytest.raises(InvalidParameterError, match="method must be one of"):
            say(session, "/method magic")

    def test_alpha_as_a_number(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama()
        session = fake_session(llm)
        say(session, "/alpha", "/alpha 0.7", "/method static", "/alpha math=0.5", "Hi")
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "alpha: 1, which /method static uses; colours: off"
        assert lines[3] == "alpha: math=0.5; colours: off"
        assert llm.requests[0][1] == {"alpha": {"math": 0.5}, "method": "static"}
        for wrong in ("code=1", "much", "nan"):
            with pytest.raises(InvalidParameterError):
                say(session, f"/alpha {wrong}")
        assert session.settings["alpha"] == {"math": 0.5}

    def test_weights(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama()
        session = fake_session(llm)
        with pytest.raises(InvalidParameterError, match="method weighted needs weights"):
            say(session, "/method weighted")
        say(session, "/set weights large=0.5,math=0.8", "/method weighted", "Hi")
        assert capsys.readouterr().err.splitlines()[:2] == ["weights large=0.5,math=0.8 (set)", "method: weighted"]
        assert llm.requests[0][1] == {"weights": {"large": 0.5, "math": 0.8}, "method": "weighted"}
        for wrong in ("0.5", "code=1", "large=0", "large=nan"):
            with pytest.raises(InvalidParameterError):
                say(session, f"/set weights {wrong}")
        say(fake_session(llm, defaults={"weights": {"large": 1.0}}), "/method weighted")

    def test_alpha_without_colours(self, capsys: pytest.CaptureFixture[str]) -> None:
        session = fake_session(FakeLlama())
        say(session, "/alpha on")
        assert capsys.readouterr().err == "this terminal shows no colours\n"
        assert not session.paints

    def test_set(self, capsys: pytest.CaptureFixture[str]) -> None:
        llm = FakeLlama()
        session = fake_session(llm, defaults={"top_k": 7})
        say(
            session, "/set top-k", "/set temperature\t 0", "/set seed 5", "/set stop the end", "/set max_tokens 3", "Hi"
        )
        assert capsys.readouterr().err.splitlines()[:3] == ["top_k 7", "temperature 0 (set)", "seed 5 (set)"]
        assert llm.requests[0][1] == {"temperature": 0.0, "seed": 5, "stop": ("the end",), "max_tokens": 3}
        say(session, "/set seed default", "/set")
        assert "seed none\n" in capsys.readouterr().err
        assert "seed" not in session.settings

    @pytest.mark.parametrize(
        "line", ["/set nope", "/set nope 1", "/set temperature hot", "/set temperature -1", "/set max_tokens 0"]
    )
    def test_a_wrong_setting_changes_nothing(self, line: str) -> None:
        session = fake_session(FakeLlama())
        with pytest.raises(InvalidParameterError):
            say(session, line)
        assert session.settings == {}

    def test_stats(self, capsys: pytest.CaptureFixture[str]) -> None:
        session = fake_session(FakeLlama(["a", "b"], n_ctx=100))
        say(session, "/stats", "Hi", "/stats")
        assert capsys.readouterr().err.splitlines()[-3:] == [
            "family fake · method dynamic · context 100 tokens",
            "1 answer · 2 tokens generated",
            "last answer: prompt 9 tokens, 9 of them evaluated at 9.0 tokens/s · 2 tokens at 10.0 tokens/s · "
            "context 11% used",
        ]


class TestFiles:
    def test_save_and_load(self, tmp_path: Path) -> None:
        file = tmp_path / "a chat.json"
        session = fake_session(
            FakeLlama(), system="S", settings={"stop": ("x",), "alpha": {"math": 0.5}, "seed": 2**63}
        )
        say(session, "Hi \udcff é", f"/save {file}")
        llm = FakeLlama()
        other = fake_session(llm)
        say(other, "gone", f"/load {file}", "Ho")
        assert other.settings == session.settings
        assert other.conversation.messages[:2] == session.conversation.messages
        assert llm.requests[-1][0] == "system: S\nuser: Hi \udcff é\nassistant: ok\nuser: Ho\n"
        assert [path.name for path in tmp_path.iterdir()] == ["a chat.json"]

    def test_saving_over_a_file_is_all_or_nothing(self, tmp_path: Path) -> None:
        file = tmp_path / "chat.json"
        Conversation().save(file, "fake", {})
        before = file.read_bytes()
        with pytest.raises(TypeError):
            Conversation().save(file, "fake", {"seed": object()})
        assert file.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["chat.json"]

    @pytest.mark.parametrize("name", ["", "missing/chat.json", "."])
    def test_a_place_that_cannot_be_written(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(EdgeDLFError):
            say(fake_session(FakeLlama()), f"/save {tmp_path / name if name else ''}")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("", "not valid JSON"),
            ("\xff", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ("[]", "not a saved conversation"),
            ('{"format": "edge-dlf chat 1", "messages": []}', "not a saved conversation"),
            ('{"format": "edge-dlf chat 1", "settings": {}}', "not a saved conversation"),
            ([{"role": "user"}], "not a saved conversation"),
            ([{"role": "assistant", "content": "x"}], "not a saved conversation"),
            ([{"role": "user", "content": "x"}] * 2, "not a saved conversation"),
            ({"method": "code"}, "method must be one of"),
            ({"seed": "many"}, "seed must be an integer"),
            ({"temperature": [1]}, "temperature must be a finite number"),
            ({"alpha": {"code": 1}}, "alpha names 'code'"),
            ({"alpha": {"math": "x"}}, "alpha of math must be a finite number, not 'x'"),
            ({"stop": [""]}, "a stop string must not be empty"),
            ({"logit_bias": {}}, "there is no setting 'logit_bias'"),
        ],
    )
    def test_a_file_that_cannot_be_used_changes_nothing(
        self, tmp_path: Path, content: str | list[Any] | dict[str, Any], reason: str
    ) -> None:
        if isinstance(content, list):
            content = json.dumps({"format": "edge-dlf chat 1", "settings": {}, "messages": content})
        elif isinstance(content, dict):
            content = json.dumps({"format": "edge-dlf chat 1", "settings": content, "messages": []})
        (tmp_path / "chat.json").write_text(content, "latin-1")
        session = fake_session(FakeLlama(), settings={"seed": 1})
        say(session, "Hi")
        with pytest.raises(EdgeDLFError, match=re.escape(reason)) as raised:
            say(session, f"/load {tmp_path / 'chat.json'}")
        assert "\n" not in str(raised.value)
        assert len(session.conversation.messages) == 2
        assert session.settings == {"seed": 1}

    @pytest.mark.parametrize("name", ["missing.json", ".", "\0", "~nosuch/x", "a" * 300])
    def test_a_file_that_is_not_there(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(EdgeDLFError, match="cannot be read") as raised:
            load(Path(name) if name.startswith("~") else tmp_path / name)
        assert "JSON" not in str(raised.value)

    def test_a_file_that_never_ends(self) -> None:
        with pytest.raises(EdgeDLFError, match=r"^/dev/zero: has more than 64 MiB$"):
            load(Path("/dev/zero"))

    def test_a_name_of_megabytes_is_shown_by_its_beginning(self) -> None:
        with pytest.raises(EdgeDLFError) as raised:
            say(fake_session(FakeLlama()), f"/set {'x' * 1_000_000} 1")
        assert len(str(raised.value)) < 500


class TestPaint:
    def test_each_expert_has_a_hue_that_grows_with_alpha(self) -> None:
        paint = AlphaPaint(["math", "code"], 2.0, ColorSystem.TRUECOLOR)
        assert paint.brush(0.0, None) is None
        brushes = [paint.brush(*token) for token in [(0.5, "math"), (2.0, "math"), (9.0, "math"), (2.0, "code")]]
        shown = [brush("x") for brush in brushes if brush]
        assert shown[1] == shown[2] == "\x1b[38;2;255;95;0mx\x1b[0m"
        assert len({*shown}) == 3

    def test_the_legend_names_scale_and_experts(self) -> None:
        legend = AlphaPaint(["math", "code"], 2.0, ColorSystem.EIGHT_BIT).legend()
        assert re.sub("\x1b[^m]*m", "", legend) == "α: math 0 0.5 1 1.5 2 · code 0 0.5 1 1.5 2"

    def test_tokens_are_coloured(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr("edge_dlf.cli.session.color_system", lambda: ColorSystem.TRUECOLOR)
        session = fake_session(FakeLlama([("hot", 2.0), " cold"]))
        say(session, "/alpha on", "Hi", "/alpha off", "Ho")
        assert capsys.readouterr().out.splitlines()[1:] == ["\x1b[38;2;255;95;0mhot\x1b[0m cold", "ok"]


class TestPipe:
    @pytest.fixture
    def chat(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
        def chat(llm: FakeLlama, stdin: str | bytes, *args: str) -> Result:
            monkeypatch.setattr(Options, "load", lambda _: llm)
            files = ["--large", "l.gguf", "--base", "b.gguf", "--expert", "math=e.gguf"]
            return CliRunner().invoke(main, ["chat", *files, *args], input=stdin)

        return chat

    def test_a_line_is_a_message(self, chat: Callable[..., Result]) -> None:
        llm = FakeLlama(["A"], ["\x1b[1mB"])
        result = chat(llm, "one\n\ntwo\r\n", "--system", "S")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "A\n\x1b[1mB\n", "")
        assert llm.requests[1][0] == "system: S\nuser: one\nassistant: A\nuser: two\n"

    def test_commands_and_bytes(self, chat: Callable[..., Result]) -> None:
        llm = FakeLlama()
        result = chat(llm, b"/method large\n\xff\n/exit\nnever\n")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "ok\n", "method: large\n")
        assert llm.requests == [("user: \udcff\n", {"method": "large"})]

    def test_errors_go_to_stderr_and_the_rest_is_answered(self, chat: Callable[..., Result]) -> None:
        result = chat(FakeLlama([DecodeError("large failed")]), "one\ntwo\n")
        assert (result.exit_code, result.stdout, result.stderr) == (1, "ok\n", "edge-dlf: large failed\n")

    def test_a_line_that_is_too_long_is_an_error_and_the_rest_is_answered(
        self, chat: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
        result = chat(FakeLlama(), b"a" * 1000 + b"\ntwo\n")
        assert (result.exit_code, result.stdout) == (1, "ok\n")
        assert result.stderr == "edge-dlf: line 1 has more than 64 MiB\n"

    @pytest.mark.parametrize(
        ("stdin", "reason"),
        [(b"a" * 1000, "has more than 1 GiB"), ("Hi".encode("utf-16"), "is UTF-16"), (gzip.compress(b"Hi"), "gzip")],
    )
    def test_what_is_no_text_or_never_ends_is_refused(
        self, chat: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, stdin: bytes, reason: str
    ) -> None:
        monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 100)
        monkeypatch.setattr(jsonl, "_ENDLESS_BYTES", 500)
        result = chat(FakeLlama(), stdin)
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert reason in result.stderr

    def test_a_byte_order_mark_is_no_text(self, chat: Callable[..., Result]) -> None:
        llm = FakeLlama()
        assert chat(llm, b"\xef\xbb\xbf/method large\nHi\n").exit_code == 0
        assert llm.requests == [("user: Hi\n", {"method": "large"})]

    def test_ctrl_c_leaves(self, chat: Callable[..., Result]) -> None:
        llm = FakeLlama(["par", KeyboardInterrupt()])
        result = chat(llm, "one\ntwo\n")
        assert (result.exit_code, result.stdout) == (130, "par\n")
        assert llm.is_closed
