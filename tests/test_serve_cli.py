"""`edge-dlf serve` as its user meets it: refusals, and how signals end it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner

from edge_dlf.cli import main

LONG = {"messages": [{"role": "user", "content": "Hello"}], "stream": True, "logit_bias": {"305": -100, "303": -100}}


@contextmanager
def served(tiny: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and its address."""
    command = [
        sys.executable,
        "-m",
        "edge_dlf",
        "serve",
        str(tiny),
        "--port",
        "0",
        "--ctx-size",
        "2048",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            lines = iter(process.stderr.readline, "")
            # The one address of its line, for programs that look for it.
            (url,) = next(found for line in lines if (found := re.findall(r"http://\S+", line)))
            yield process, url
        finally:
            process.kill()


@pytest.mark.parametrize(("signals", "code"), [([signal.SIGTERM], 143), ([signal.SIGINT, signal.SIGINT], 130)])
def test_a_signal_ends_it_and_tells_those_who_wait(tiny: Path, signals: list[signal.Signals], code: int) -> None:
    with served(tiny) as (process, url), httpx.Client(base_url=url, timeout=120) as client:
        with client.stream("POST", "/v1/chat/completions", json=LONG) as response:
            lines = response.iter_lines()
            assert next(lines)
            for number in signals:
                process.send_signal(number)
            rest = [line for line in lines if line]
        # Within the time of grace an answer may also have come to its end.
        assert '"code":"stopping"' in rest[-1] or rest[-1] == "data: [DONE]"
        assert process.wait(60) == code
        assert process.stderr
        assert "Traceback" not in process.stderr.read()
        with pytest.raises(httpx.ConnectError):
            client.get("/health")


def test_it_refuses_other_machines_without_a_key(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_DLF_API_KEY", raising=False)
    result = CliRunner().invoke(main, ["serve", str(tiny), "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 2
    assert result.stderr.startswith("edge-dlf: 0.0.0.0 can be reached from other machines")


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", str(tiny), "--port", str(port)])
    assert result.exit_code == 1
    assert result.stderr == f"edge-dlf: cannot listen at 127.0.0.1:{port}: address already in use\n"


def test_an_address_of_no_machine_is_a_wrong_use(tiny: Path) -> None:
    result = CliRunner().invoke(main, ["serve", str(tiny), "--host", "no such host", "--port", "0"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1


def test_without_its_libraries_it_says_what_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("edge_dlf.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    result = CliRunner().invoke(main, ["serve", str(tiny)])
    assert result.exit_code == 2
    assert "pip install 'edge-dlf[serve]'" in result.stderr


@pytest.mark.parametrize(
    ("option", "content", "complaint"),
    [
        ("--json-schema", b"{", "not JSON"),
        ("--json-schema", b"[]", "not a JSON object"),
        ("--json-schema", b'{"type": "banana"}', "banana"),
        ("--grammar", b"\xff", "no UTF-8"),
        ("--grammar", b"root = x", "expecting ::="),
    ],
)
def test_a_form_that_cannot_be_used_is_one_line(
    tiny: Path, tmp_path: Path, option: str, content: bytes, complaint: str
) -> None:
    (tmp_path / "form").write_bytes(content)
    result = CliRunner().invoke(main, ["generate", "Hi", "-f", str(tiny), option, str(tmp_path / "form")])
    assert result.exit_code == 2
    assert complaint in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_generate_keeps_to_a_schema_and_to_a_grammar(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text('{"enum": ["red", "green"]}')
    (tmp_path / "answer.gbnf").write_text('root ::= "yes" | "no"')
    for arguments, expected in (
        (["--json-schema", str(tmp_path / "schema.json")], {'"red"\n', '"green"\n'}),
        (["--grammar", str(tmp_path / "answer.gbnf"), "--raw"], {"yes\n", "no\n"}),
    ):
        result = CliRunner().invoke(main, ["generate", "Hi", "-f", str(tiny), *arguments, "--max-tokens", "20"])
        assert result.exit_code == 0
        assert result.stdout in expected
