"""What shells, editors and other programs do to the files of a batch, on a scripted family."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_dlf import FusedLlama, InvalidParameterError

from .fake_llm import FakeLlama
from .test_batch_cli import Healed, Runner, Stopping, kill, prompts, read, write
from .test_batch_cli import run as run  # the fixture
from .tiny import tiny_lora, tiny_model


def order(name: str) -> list[str]:
    return [row["custom_id"] or f"line {row['error']['line']}" for row in read(name)]


MIXED = [
    '{"id": "a", "prompt": "x"}',
    "{broken",
    '{"id": "c", "prompt": "fail"}',
    '{"id": "a"}',
    '{"id": "e", "prompt": "y"}',
]
IN_ORDER = ["a", "line 2", "c", "line 4", "e"]


class TestOrder:
    def test_lines_that_are_no_requests_keep_their_place(self, run: Runner) -> None:
        write("in", MIXED)
        assert run(FakeLlama(), "in", "-o", "out", "--ordered").exit_code == 1
        assert order("out") == IN_ORDER

    def test_rows_that_are_run_again_go_back_to_their_place(self, run: Runner) -> None:
        write("in", MIXED)
        run(FakeLlama(), "in", "-o", "out", "--ordered")
        run(Healed(), "in", "-o", "out", "--ordered", "--retry-errors")
        assert order("out") == IN_ORDER
        assert [row["custom_id"] for row in read("out") if row["error"]] == [None, None]

    def test_rows_of_a_run_without_order_find_their_place(self, run: Runner) -> None:
        write("in", prompts(40))
        assert run(Stopping(17, kill(2)), "in", "-o", "out").exit_code == 130
        run(FakeLlama(), "in", "-o", "out", "--ordered")
        assert order("out") == [f"r{n}" for n in range(40)]

    def test_a_file_of_errors_is_in_order_too(self, run: Runner) -> None:
        write("in", MIXED)
        for more in ([], ["--retry-errors"]):
            run(FakeLlama(), "in", "-o", "out", "--errors", "bad", "--ordered", *more)
            assert (order("out"), order("bad")) == (["a", "e"], ["line 2", "c", "line 4"])

    def test_stopped_in_the_middle(self, run: Runner) -> None:
        write("in", [row for n in range(10) for row in (json.dumps({"id": f"r{n}", "prompt": "x"}), "{")])
        wanted = [name for n in range(10) for name in (f"r{n}", f"line {2 * n + 2}")]
        for n_rows in (3, 4, 99):
            run(Stopping(n_rows, kill(15)), "in", "-o", "out", "--ordered")
            assert order("out") == wanted[: len(order("out"))]
        assert order("out") == wanted


class TestGrowingInput:
    @pytest.mark.parametrize("n_bytes", [1, 7, 25, 29, 30])
    def test_a_torn_last_line_is_read_again(self, run: Runner, n_bytes: int) -> None:
        last = json.dumps({"id": "z", "prompt": "é"}, ensure_ascii=False).encode()
        Path("in").write_bytes(b'{"id": "a", "prompt": "x"}\n' + last[:n_bytes])
        run(FakeLlama(), "in", "-o", "out")
        with Path("in").open("ab") as file:
            file.write(last[n_bytes:] + b"\n")
        result = run(FakeLlama(), "in", "-o", "out")
        assert result.exit_code == 0
        assert sorted(order("out")) == ["a", "z"]

    def test_one_that_stays_torn_is_one_error(self, run: Runner) -> None:
        Path("in").write_text('{"id": "a", "prompt": "x"}\n{"id": "z", "pro')
        for _ in range(3):
            assert run(FakeLlama(), "in", "-o", "out").exit_code == 1
            assert sorted(order("out")) == ["a", "line 2"]
        (error,) = [row["error"] for row in read("out") if row["error"]]
        assert error["code"] == "incomplete_line"
        assert "is read again next time" in error["message"]

    def test_a_pipe_whose_writer_died(self, run: Runner) -> None:
        run(FakeLlama(), "-", "-o", "out", stdin='{"id": "a", "prompt": "x"}\n{"id": "z", "pro')
        run(FakeLlama(), "-", "-o", "out", stdin='{"id": "a", "prompt": "x"}\n{"id": "z", "prompt": "y"}\n')
        assert order("out") == ["a", "z"]


class TestOverwriting:
    @pytest.mark.parametrize(
        "args",
        [
            ["-o", "out", "--trace", "out"],
            ["-o", "out", "--trace", "link"],
            ["-o", "out", "--trace", "in"],
            ["-o", "out", "--trace", "out.manifest.json"],
            ["-o", "out", "--trace", ".out.lock"],
            ["-o", "out", "--errors", "out.manifest.json"],
            ["-o", "out", "--errors", ".out.new"],
            ["-o", "out", "--errors", "bad", "--trace", "bad"],
            ["-o", "link", "--errors", "out"],
            ["-o", "in", "--restart"],
        ],
    )
    def test_two_files_that_are_one_are_refused_before_anything_is_written(self, run: Runner, args: list[str]) -> None:
        write("in", prompts(2))
        Path("link").symlink_to("out")
        names = {path.name for path in Path().iterdir()}
        result = run(FakeLlama(), "in", *args)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "is both" in result.stderr or "is the input" in result.stderr
        assert {path.name for path in Path().iterdir()} == names

    def test_a_pipe_that_would_be_read_and_written_is_refused(self, run: Runner) -> None:
        os.mkfifo("fifo")
        Path("link").symlink_to("fifo")
        fd = os.open("fifo", os.O_RDWR)  # so that nobody waits for the other end
        try:
            result = run(FakeLlama(), "fifo", "-o", "link")
        finally:
            os.close(fd)
        assert (result.exit_code, result.stderr) == (2, "edge-dlf: link: is the input; write the answers elsewhere\n")

    @pytest.mark.parametrize("args", [["-o", "out/"], ["-o", "out", "--errors", "bad/"], ["-o", "in/"]])
    def test_a_name_that_ends_as_a_folder_is_no_file(self, run: Runner, args: list[str]) -> None:
        write("in", prompts(2))
        result = run(FakeLlama(), "in", *args)
        assert (result.exit_code, "is a folder" in result.stderr) == (2, True)
        assert [path.name for path in Path().iterdir()] == ["in"]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
    def test_a_manifest_that_never_ends_is_none(self, run: Runner) -> None:
        write("in", prompts(2))
        Path("out.manifest.json").symlink_to("/dev/full")
        result = run(FakeLlama(), "in", "-o", "out")
        assert (result.exit_code, "is no manifest" in result.stderr) == (2, True)

    def test_so_are_hard_links_of_what_is_there(self, run: Runner) -> None:
        write("in", prompts(2))
        run(FakeLlama(), "in", "-o", "out", "--trace", "trace")
        before = {name: Path(name).read_bytes() for name in ("out", "out.manifest.json")}
        for name in before:
            Path(f"hard-{name}").hardlink_to(name)
        for more in (
            ["--trace", "hard-out"],
            ["--errors", "hard-out.manifest.json"],
            ["--trace", "hard-out.manifest.json"],
        ):
            assert run(FakeLlama(), "in", "-o", "out", *more).exit_code == 2
        assert {name: Path(name).read_bytes() for name in before} == before

    def test_an_input_that_the_manifest_would_replace(self, run: Runner) -> None:
        write("out.manifest.json", prompts(2))
        result = run(FakeLlama(), "out.manifest.json", "-o", "out")
        assert result.exit_code == 2
        assert "is both the input and the manifest" in result.stderr

    def test_a_file_of_mine_in_the_place_of_the_manifest_stays(self, run: Runner) -> None:
        write("in", prompts(2))
        Path("out.manifest.json").write_text('{"mine": 1}')
        assert run(FakeLlama(), "in", "-o", "out").exit_code == 2
        assert Path("out.manifest.json").read_text() == '{"mine": 1}'

    def test_a_trace_goes_into_no_pipe(self, run: Runner) -> None:
        write("in", prompts(2))
        os.mkfifo("fifo")
        result = run(FakeLlama(), "in", "-o", "out", "--trace", "fifo")
        assert (result.exit_code, result.stderr) == (2, "edge-dlf: fifo: is no regular file\n")


class TestEdited:
    def edits(self, content: bytes) -> list[bytes]:
        windows = content.replace(b"\n", b"\r\n")
        return [
            b"\xef\xbb\xbf" + content,
            windows,
            b"\xef\xbb\xbf" + windows,
            content.replace(b"\n", b"\n\n"),
            b"\n" + content,
        ]

    def test_an_output_that_another_editor_saved_is_cleaned_and_nothing_runs_again(self, run: Runner) -> None:
        write("in", prompts(6))
        run(FakeLlama(), "in", "-o", "out")
        content = Path("out").read_bytes()
        for edited in self.edits(content):
            Path("out").write_bytes(edited)
            llm = FakeLlama()
            run(llm, "in", "-o", "out")
            assert llm.requests == []
            assert Path("out").read_bytes() == content

    def test_what_is_clean_is_not_written_again(self, run: Runner) -> None:
        write("in", prompts(6))
        run(FakeLlama(), "in", "-o", "out")
        before = Path("out").stat().st_ino
        run(FakeLlama(), "in", "-o", "out")
        assert Path("out").stat().st_ino == before

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
    def test_utf16_is_said_once(self, run: Runner, encoding: str) -> None:
        write("in", prompts(6))
        Path("wide").write_text(Path("in").read_text(), encoding)
        result = run(FakeLlama(), "wide", "-o", "out")
        assert result.exit_code == 2
        assert result.stderr == "edge-dlf: wide: is UTF-16, not UTF-8; `iconv -f UTF-16 -t UTF-8` converts it\n"
        run(FakeLlama(), "in", "-o", "out", "--restart")
        saved = Path("out").read_text().encode(encoding)
        Path("out").write_bytes(saved)
        assert run(FakeLlama(), "in", "-o", "out").exit_code == 2
        assert Path("out").read_bytes() == saved

    def test_compressed_input_is_said_once(self, run: Runner) -> None:
        Path("in.jsonl.gz").write_bytes(gzip.compress(json.dumps({"prompt": "x"}).encode()))
        result = run(FakeLlama(), "in.jsonl.gz", "-o", "out")
        assert (result.exit_code, result.stderr) == (
            2,
            "edge-dlf: in.jsonl.gz: is compressed (gzip); unpack it first\n",
        )
        assert run(FakeLlama(), "-", "-o", "piped", stdin=Path("in.jsonl.gz").read_bytes()).exit_code == 2


class TestStreams:
    @pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
    def test_stdout_by_another_name(self, run: Runner, name: str) -> None:
        write("in", prompts(3))
        result = run(FakeLlama(), "in", "-o", name)
        assert sorted(json.loads(line)["custom_id"] for line in result.stdout.splitlines()) == ["r0", "r1", "r2"]
        assert {path.name for path in Path().iterdir()} == {"in"}

    def test_a_process_substitution(self, run: Runner) -> None:
        write("in", prompts(3))
        reader, writer = os.pipe()
        result = run(FakeLlama(), "in", "-o", f"/dev/fd/{writer}")
        os.close(writer)
        with os.fdopen(reader) as file:
            assert sorted(json.loads(line)["custom_id"] for line in file) == ["r0", "r1", "r2"]
        assert result.exit_code == 0


class Templates:
    """A family of tiny models whose chat template is `source`."""

    def __init__(self, folder: Path, source: str | None) -> None:
        tiny_model(folder / "large.gguf", seed=1, **({"chat_template": source} if source else {}))
        tiny_model(folder / "base.gguf", seed=2)
        tiny_lora(folder / "lora.gguf", seed=3)
        self.arguments = [folder / "large.gguf", folder / "base.gguf", {"x": folder / "lora.gguf"}]


@pytest.mark.parametrize("source", ["{% for m in messages %}{{ m.content", "{{ messages | nosuch }}"])
def test_a_template_that_cannot_be_used_is_found_once(tmp_path: Path, source: str) -> None:
    arguments: Any = Templates(tmp_path, source).arguments
    with FusedLlama(*arguments, n_ctx=128, n_threads=1) as llm:
        pulled = []
        rows = (pulled.append(n) or {"prompt": "the cat"} for n in range(50))
        with pytest.raises(InvalidParameterError, match="template is not valid: .*--raw"):
            list(llm.batch(rows, raw=False, max_tokens=1))
        assert len(pulled) == 1
        assert [row["error"] for row in llm.batch([{"prompt": "the cat"}], raw=True, max_tokens=1)] == [None]


def test_messages_that_a_template_refuses_are_their_own_rows_error(tmp_path: Path) -> None:
    source = "{{ raise_exception('no') if messages[0].content == 'no' else messages[0].content }}"
    arguments: Any = Templates(tmp_path, source).arguments
    with FusedLlama(*arguments, n_ctx=128, n_threads=1) as llm:
        rows = list(llm.batch([{"prompt": "no"}, {"prompt": "the cat"}], raw=False, max_tokens=1, ordered=True))
    assert [bool(row["error"]) for row in rows] == [True, False]


class TestExact:
    def test_it_is_one_row_at_a_time_and_part_of_the_manifest(self, run: Runner) -> None:
        write("in", prompts(3))
        llm = FakeLlama()
        run(llm, "in", "-o", "out", "--exact")
        assert llm.options
        assert llm.options.loading == {"n_parallel": 1}
        assert llm.requests[0][1]["exact"] is True
        assert "exact was true, now not given" in run(FakeLlama(), "in", "-o", "out").stderr
        assert run(FakeLlama(), "in", "-o", "new", "--exact", "--parallel", "4").exit_code == 2

    def test_every_row_begins_with_empty_caches(self, tiny: Path) -> None:
        rows: list[dict[str, Any]] = [
            {"id": str(n), "prompt": f"the cat and the {word}", "logprobs": 1}
            for n, word in enumerate(["hen", "ant", "inn"])
        ]

        def results(llm: FusedLlama, rows: Sequence[dict[str, Any]]) -> list[Any]:
            found = llm.batch(rows, exact=True, ordered=True, max_tokens=6)
            return [(row["custom_id"], row["response"]["body"]["choices"]) for row in found]

        with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
            whole = results(llm, rows)
            alone = [result for row in reversed(rows) for result in results(llm, [row])]
        assert whole == alone[::-1]  # logprobs too, to the last bit

    def test_several_at_once_are_refused(self, tiny: Path) -> None:
        many = FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=2)
        with many as llm, pytest.raises(InvalidParameterError, match="n_parallel=1"):
            next(llm.batch([], exact=True))


def test_a_shell_may_compress_what_comes(tmp_path: Path) -> None:
    (tmp_path / "in").write_text('{"id": "1", "prompt": "How much is 1 and 2 together?"}\n')
    edge = f"{sys.executable} -m edge_dlf batch in --quiet --max-tokens 2 -o"
    subprocess.run(["bash", "-c", f"{edge} >(gzip > out.gz); wait $!"], cwd=tmp_path, check=True)
    assert json.loads(gzip.decompress((tmp_path / "out.gz").read_bytes()))["custom_id"] == "1"
