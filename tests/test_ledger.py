"""What a batch reads and writes: lines, ids, files that survive, the output of an earlier run, its manifest."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dlf import EdgeDLFError, InvalidParameterError
from edge_dlf.batch.ids import Ids
from edge_dlf.batch.intake import Intake, fingerprint
from edge_dlf.batch.ledger import Ledger, resume
from edge_dlf.families.files import check_files
from edge_dlf.families.manifest import Manifest
from edge_dlf.families.spec import FamilySpec
from edge_dlf.system import durable, jsonl
from edge_dlf.system.durable import Appender, new_name, replacing
from edge_dlf.system.file_locks import locked
from edge_dlf.system.jsonl import Pipe, dump_line, parse_object, read_lines

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["\ud800", "a\u2028b\x85"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def done(id: str, text: str = "é") -> dict[str, Any]:
    return {"id": "x", "custom_id": id, "response": {"body": {"text": text}}, "error": None}


def failed(id: str | None, line: int = 1) -> dict[str, Any]:
    return {"id": "x", "custom_id": id, "response": None, "error": {"code": "c", "message": "m", "line": line}}


class TestLines:
    @given(
        st.lists(st.sampled_from([b"", b" \t", b"{}", b"\xc3\xa9\xff", b"\x00", b"a\rb"]), max_size=6), st.booleans()
    )
    def test_every_line_that_is_not_blank_is_found_where_it_lies(self, parts: list[bytes], ends: bool) -> None:
        whole = b"\n".join(parts) + (b"\n" if ends and parts else b"")
        for line in read_lines(io.BytesIO(whole)):
            assert whole[line.start : line.start + line.n_bytes] == line.content
            assert line.is_whole == line.content.endswith(b"\n")
            assert line.content.rstrip(b"\n") == parts[line.number - 1]
        assert [line.number for line in read_lines(io.BytesIO(whole))] == [
            number for number, part in enumerate(parts, 1) if part.strip()
        ]

    def test_a_line_that_is_too_long_is_passed_over_in_bounded_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 8)
        lines = list(read_lines(io.BytesIO(b"1234567\n123456789\n" + b"x" * 1000 + b"\nlast" + b"y" * 50)))
        assert [(line.number, line.content, line.is_whole) for line in lines] == [
            (1, b"1234567\n", True),
            (2, None, True),
            (3, None, True),
            (4, None, False),
        ]
        assert [(line.start, line.n_bytes) for line in lines] == [(0, 8), (8, 10), (18, 1001), (1019, 54)]

    def test_a_line_that_never_ends_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jsonl, "_ENDLESS_BYTES", 1 << 22)
        monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1 << 20)
        with (
            Path("/dev/zero").open("rb") as file,
            pytest.raises(InvalidParameterError, match="line 1 has more than 1 GiB"),
        ):
            list(read_lines(file))

    def test_a_pipe_gives_the_lines_that_a_file_gives(self) -> None:
        content = b"one\n\n" + b"x" * 70_000 + b"\nthree"
        for limit in (3, 1000, 1 << 20):
            reader, writer = os.pipe()
            pipe, file = Pipe(reader), io.BytesIO(content)
            assert pipe.would_wait()
            feeding = threading.Thread(target=lambda fd=writer: (os.write(fd, content), os.close(fd)))
            feeding.start()
            while line := file.readline(limit):
                assert pipe.readline(limit) == line
            assert pipe.readline(limit) == b""
            assert not pipe.would_wait()
            feeding.join()
            os.close(reader)

    def test_a_byte_order_mark_is_left_out_and_carriage_returns_do_no_harm(self) -> None:
        (line,) = read_lines(io.BytesIO(b'\xef\xbb\xbf{"a": 1}\r\n\r\n'))
        assert parse_object(line.content or b"") == {"a": 1}
        assert parse_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b'{"a": \xff}', "not UTF-8 at byte 7"),
            (b'{"a": 1', "not JSON: Expecting ',' delimiter at character 8"),
            (b'{"a": "\x00"}', "not JSON: Invalid control character at at character 8"),
            (b'{"a": NaN}', "not usable: NaN is no number of JSON"),
            (b"[" * 100_000, "nested too deeply"),
            (b'{"a": ' + b"1" * 5000 + b"}", "not usable: Exceeds the limit"),
            (b"[]", "not a JSON object"),
            (b"null", "not a JSON object"),
        ],
    )
    def test_what_is_no_object_says_why(self, content: bytes, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            parse_object(content)

    @given(st.dictionaries(st.text(), json_values, max_size=4))
    def test_whatever_is_written_is_one_line_that_can_be_read(self, row: dict[str, Any]) -> None:
        line = dump_line(row)
        assert line.endswith(b"\n")
        assert len(line.decode().splitlines()) == 1
        assert parse_object(line).keys() == row.keys()

    def test_what_is_written_reads_the_same(self) -> None:
        row = {"é": ["\u2028\x85\x1c\n", 1.5, None, {"😀": True}]}
        assert parse_object(dump_line(row)) == row
        assert parse_object(dump_line({"a": [float("nan"), "\ud800"]})) == {"a": [None, "\ud800"]}


class TestIds:
    def test_as_a_set_would_have_it(self) -> None:
        chance, ids, finished, seen = random.Random(1), Ids(), set(), set()
        for _ in range(5000):
            id = chance.choice([str, int])(chance.randrange(3000))
            assert ids.finish(id) == (id not in finished)
            finished.add(id)
        for _ in range(20_000):
            id = chance.choice([str, int])(chance.randrange(9000))
            assert ids.meet(id) == ("repeated" if id in seen else "finished" if id in finished else "new")
            seen.add(id)


class TestAppender:
    def test_appends_and_cuts_off_what_was_torn(self, tmp_path: Path) -> None:
        path = tmp_path / "out"
        path.write_bytes(b"one\ntw")
        with Appender(path, 4) as file:
            file.append(b"two\n")
        assert path.read_bytes() == b"one\ntwo\n"

    def test_brings_lines_to_disk_without_being_closed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, synced, fsync = tmp_path / "out", threading.Semaphore(0), os.fsync
        sizes = []

        def watched(fd: int) -> None:
            fsync(fd)
            sizes.append(os.fstat(fd).st_size)
            synced.release()

        file = Appender(path, 0)
        monkeypatch.setattr(durable.os, "fsync", watched)
        for n_lines in range(1, 3):
            file.append(b"line\n")
            assert synced.acquire(timeout=30)
            assert sizes[-1] == 5 * n_lines
        file.close()
        file.close()

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
    def test_a_full_disk_leaves_whole_lines(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        path, write = tmp_path / "out", os.write

        def short(fd: int, data: bytes) -> int:
            if len(data) < 5:
                raise OSError(number, os.strerror(number))
            return write(fd, data[:3])

        with Appender(path, 0) as file:
            file.append(b"first\n")
            monkeypatch.setattr(durable.os, "write", short)
            with pytest.raises(EdgeDLFError, match="out: .*; every row so far is kept") as raised:
                file.append(b"second\n")
            assert raised.value.exit_code == 1
            assert path.read_bytes() == b"first\n"

    def test_a_write_that_comes_in_two_is_still_one_line(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = os.write
        monkeypatch.setattr(durable.os, "write", lambda fd, data: write(fd, data[:4]))
        with Appender(tmp_path / "out", 0) as file:
            file.append(b"a long line\n")
        assert (tmp_path / "out").read_bytes() == b"a long line\n"

    @pytest.mark.parametrize("harm", ["removed", "replaced", "cut", "its folder removed"])
    def test_a_file_that_another_program_takes_away_is_an_error(self, tmp_path: Path, harm: str) -> None:
        """The rows would be lost, and the batch told as done."""
        path = tmp_path / "folder" / "out"
        path.parent.mkdir()
        file = Appender(path, 0)
        file.append(b"line\n")
        if harm == "cut":
            os.truncate(path, 2)
        else:
            path.rename(tmp_path / "moved")
        if harm == "replaced":
            path.write_bytes(b"of another program\n")
        if harm == "its folder removed":
            path.parent.rmdir()
        with pytest.raises(EdgeDLFError, match="another program has removed, replaced or cut this file") as raised:
            file.close()
        assert raised.value.exit_code == 1
        assert harm != "replaced" or path.read_bytes() == b"of another program\n"

    def test_a_disk_that_fails_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fsync(_: int) -> None:
            raise OSError(errno.EIO, "Input/output error")

        file = Appender(tmp_path / "out", 0)
        monkeypatch.setattr(durable.os, "fsync", fsync)

        def keep_writing() -> None:
            for _ in range(3000):
                file.append(b"line\n")
                time.sleep(0.01)

        with pytest.raises(EdgeDLFError, match="out: input/output error"):
            keep_writing()
        with pytest.raises(EdgeDLFError, match="out: input/output error"):
            file.close()

    def test_replacing_is_all_or_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"old")
        path.chmod(0o640)
        with pytest.raises(ZeroDivisionError), replacing(path) as file:
            file.write(b"half" * (1 // 0))
        assert path.read_bytes() == b"old"
        with replacing(path) as file:
            file.write(b"new")
        assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o640)
        assert list(tmp_path.iterdir()) == [path]


class TestResume:
    @pytest.fixture
    def reopen(self, tmp_path: Path) -> Callable[..., tuple[Ledger, list[str]]]:
        """Write `content` as an earlier output and resume it; `.path` is its name."""

        def reopen(content: bytes, retry_errors: bool = False) -> tuple[Ledger, list[str]]:
            (tmp_path / "out").write_bytes(content)
            ledger, notices = Ledger(), []
            resume(ledger, tmp_path / "out", retry_errors=retry_errors, notice=notices.append).close()
            return ledger, notices

        return reopen

    def test_finished_rows_are_known(self, reopen: Callable[..., Any], tmp_path: Path) -> None:
        content = dump_line(done("a")) + dump_line(failed("b")) + dump_line(failed(None, 7))
        ledger, notices = reopen(content)
        assert (ledger.n_rows, ledger.n_failed, notices) == (3, 2, [])
        assert [ledger.ids.meet(id) for id in ("a", "b", 7, "7", "c")] == ["finished"] * 3 + ["new"] * 2
        assert (tmp_path / "out").read_bytes() == content

    def test_a_line_torn_anywhere_is_cut_off(self, reopen: Callable[..., Any], tmp_path: Path) -> None:
        first, second = dump_line(done("a")), dump_line(done("ü", "語"))
        for n_bytes in range(1, len(second)):
            ledger, notices = reopen(first + second[:n_bytes])
            assert (tmp_path / "out").read_bytes() == first
            assert (ledger.n_rows, len(notices)) == (1, 1)
            assert ledger.ids.meet("ü") == "new"

    @pytest.mark.parametrize(
        "damaged",
        [
            b"\x00" * 50 + b"\n",
            b"{}\n",
            b'{"custom_id": "a"\n',
            b'{"custom_id": "b", "response": null, "error": null}\n',
            b'{"custom_id": null, "response": {}, "error": null}\n',
            b'{"custom_id": "b", "response": {}, "error": {}}\n',
            b'{"custom_id": 3, "response": {}, "error": null}\n',
            dump_line(done("a", "again")),
        ],
    )
    def test_damaged_and_repeated_rows_are_left_out(
        self, reopen: Callable[..., Any], tmp_path: Path, damaged: bytes
    ) -> None:
        good = [dump_line(done("a")), dump_line(done("c")), dump_line(failed("d"))]
        ledger, notices = reopen(good[0] + damaged + damaged + good[1] + damaged + good[2])
        assert (tmp_path / "out").read_bytes() == b"".join(good)
        assert (ledger.n_rows, ledger.n_failed) == (3, 1)
        assert notices == [f"{tmp_path / 'out'}: 3 damaged or repeated rows are left out; what is missing runs again"]

    def test_failed_rows_are_retried(self, reopen: Callable[..., Any], tmp_path: Path) -> None:
        good = [dump_line(done("a")), dump_line(done("c"))]
        bad = [dump_line(failed("b")), dump_line(failed(None, 3)), b'{"torn']
        ledger, notices = reopen(bad[0] + good[0] + bad[1] + good[1] + bad[2], retry_errors=True)
        assert (tmp_path / "out").read_bytes() == b"".join(good)
        assert (ledger.n_rows, ledger.n_failed, len(notices)) == (2, 0, 1)
        assert [ledger.ids.meet(id) for id in ("a", "b", 3)] == ["finished", "new", "new"]

    def test_what_a_killed_rewrite_left_behind_goes(self, reopen: Callable[..., Any], tmp_path: Path) -> None:
        new_name(tmp_path / "out").write_bytes(b"half")
        reopen(b"")
        assert list(tmp_path.iterdir()) == [tmp_path / "out"]

    def test_a_file_has_one_writer(self, tmp_path: Path) -> None:
        with locked([tmp_path / "out"]), pytest.raises(EdgeDLFError, match="another run is writing to it"):
            locked([tmp_path / "other", tmp_path / "out"]).__enter__()
        with locked([tmp_path / "out"]):
            pass

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidParameterError, match="there is no folder"), locked([tmp_path / "no" / "out"]):
            pass
        assert not (tmp_path / "no").exists()


class TestIntake:
    @staticmethod
    def ids(requests: list[dict[str, Any]]) -> list[str]:
        return [request.get("custom_id") or request["id"] for request in requests]

    def rows(self, text: str, ids: Ids | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        rejected: list[dict[str, Any]] = []
        return list(Intake(read_lines(io.BytesIO(text.encode())), ids or Ids(), rejected.append)), rejected

    def test_ids(self) -> None:
        requests, rejected = self.rows(
            '{"custom_id": "a", "id": "z"}\n{"id": "b"}\n{"id": 7}\n\n{"prompt": "x"}\n{"id": null}\n\n{"body": {}}\n'
        )
        assert requests == [
            {"custom_id": "a", "id": "z"},
            {"id": "b"},
            {"id": "7"},
            {"prompt": "x", "id": "5"},
            {"id": "6"},
            {"body": {}, "custom_id": "8"},
        ]
        assert rejected == []

    def test_lines_that_are_no_requests(self) -> None:
        requests, rejected = self.rows('{"id": "a"}\n{\n{"id": "a"}\n{"id": ""}\n{"id": true}\n{"id": []}\n')
        assert self.ids(requests) == ["a"]
        assert all(row["custom_id"] is row["response"] is None for row in rejected)
        assert [(row["error"]["line"], row["error"]["code"]) for row in rejected] == [
            (2, "invalid_json"),
            (3, "duplicate_id"),
            (4, "invalid_request"),
            (5, "invalid_request"),
            (6, "invalid_request"),
        ]

    def test_what_is_finished_is_passed_over(self) -> None:
        ids = Ids()
        for id in ("a", 3, 4):
            ids.finish(id)
        requests, rejected = self.rows('{"id": "a"}\n{"id": "b"}\n{"id": "b"}\n{\n[]\n', ids)
        assert self.ids(requests) == ["b"]
        assert [row["error"]["line"] for row in rejected] == [5]

    def test_errors_get_the_number_of_their_line(self) -> None:
        rows: list[Any] = []
        intake = Intake(read_lines(io.BytesIO(b'\n{"id": "a"}\n{"id": "b"}\n')), Ids(), rows.append)
        list(intake)
        error = {"code": "c", "message": "m"}
        intake.finished({"custom_id": "a", "error": error})
        intake.finished(done("b"))
        assert rows == [{"custom_id": "a", "error": {**error, "line": 2}}, done("b")]
        assert intake.n_running == 0

    @given(st.binary(max_size=20), st.integers(0, 30))
    def test_a_fingerprint_is_that_of_the_bytes_asked_for(self, content: bytes, n_bytes: int) -> None:
        file = io.BytesIO(content)
        assert fingerprint(file, n_bytes) == fingerprint(io.BytesIO(content[:n_bytes]))
        assert (file.tell(), fingerprint(file)["bytes"]) == (0, len(content))
        assert fingerprint(file) != fingerprint(io.BytesIO(content + b"x"))


class TestManifest:
    def test_there_and_back(self, tiny: Path, tmp_path: Path) -> None:
        parameters = {"stop": ("a", "b"), "logit_bias": {3: -float("inf")}, "alpha": 0.5, "system": "é"}
        manifest = Manifest.of(check_files(tiny), parameters)
        manifest.save(tmp_path / "m")
        assert Manifest.load(tmp_path / "m") == manifest
        assert manifest.differences(manifest) == []
        json.loads((tmp_path / "m").read_text(), parse_constant=pytest.fail)

    def test_none(self, tmp_path: Path) -> None:
        assert Manifest.load(tmp_path / "m") is None

    @pytest.mark.parametrize(
        "content",
        [
            "", "[]", "{}", '{"format": 1}', '{"format": 2, "family": 1}', "\0\0", "[" * 100_000,
            '{"format": 1, "family": 1, "parameters": {}}', '{"format": 1, "family": {}, "parameters": [1]}',
            '{"format": 1, "family": {"large": 1}, "parameters": {}}',
            '{"format": 1, "family": {"large": [1]}, "parameters": {}}',
            '{"format": 1, "family": {"large": [{"file": "a", "bytes": "1", "digest": "b"}]}, "parameters": {}}',
            '{"format": 1, "family": {}, "parameters": {}, "input": 1}',
            '{"format": 1, "family": {}, "parameters": {}, "input": {"bytes": "1"}}',
        ],
        ids=lambda content: content[:60],
    )  # fmt: skip
    def test_one_that_cannot_be_read(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "m").write_text(content)
        with pytest.raises(InvalidParameterError, match="is no manifest"):
            Manifest.load(tmp_path / "m")

    def test_a_file_that_has_moved_is_the_same(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere.gguf").write_bytes((tiny / "large.gguf").read_bytes())
        specs = [
            FamilySpec.from_files(large, tiny / "base.gguf", {"e": tiny / "lora.gguf"})
            for large in (tiny / "large.gguf", tmp_path / "elsewhere.gguf")
        ]
        first, second = (Manifest.of(check_files(spec), {}) for spec in specs)
        assert first != second
        assert first.differences(second) == []

    @pytest.mark.parametrize("where", ["header", "first weight", "last weight"])
    def test_a_file_that_has_changed_is_another(self, tiny: Path, tmp_path: Path, where: str) -> None:
        path = tmp_path / "large.gguf"
        content = bytearray((tiny / "large.gguf").read_bytes())
        path.write_bytes(content)
        spec = FamilySpec.from_files(path, tiny / "base.gguf", {"e": tiny / "lora.gguf"})
        before = Manifest.of(check_files(spec), {})
        template = content.index(b"add_generation_prompt")
        position = {"header": template, "first weight": len(content) // 2, "last weight": -1}[where]
        content[position] ^= 1
        path.write_bytes(content)
        (found,) = before.differences(Manifest.of(check_files(spec), {}))
        assert found.startswith("large was large.gguf (")

    def test_members_and_scales(self, tiny: Path) -> None:
        def family(**experts: Any) -> Manifest:
            return Manifest.of(check_files(FamilySpec.from_files(tiny / "large.gguf", tiny / "base.gguf", experts)), {})

        lora, tuned = tiny / "lora.gguf", tiny / "tuned.gguf"
        assert family(a=lora, b=tuned).differences(family(b=tuned, a=lora)) == [
            "the members were large, base, a, b, now large, base, b, a"
        ]
        (found,) = family(a=[(lora, 1.0)]).differences(family(a=[(lora, 0.5)]))
        assert "scale 1), now lora.gguf" in found

    def test_parameters(self) -> None:
        before, now = Manifest({}, {"a": 1, "b": None, "c": "x" * 200}), Manifest({}, {"a": 2, "b": "é", "c": "y"})
        assert before.differences(now) == [
            "a was 1, now 2",
            'b was not given, now "é"',
            f'c was "{"x" * 76}…, now "y"',
        ]
