"""`run_file`: what `edge-dlf batch` promises of its files, from Python."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from edge_dlf import FusedLlama, InvalidParameterError, RequestInterruptedError
from edge_dlf.batch import run_file
from edge_dlf.batch.progress import Progress
from edge_dlf.cli import main

ROWS: list[Mapping[str, Any] | str] = [
    {"id": "a", "prompt": "one two"},
    {"id": "b", "prompt": "two", "temperature": 1.0},
    {"id": "hot", "prompt": "one", "temperature": "hot"},
    {"custom_id": "c", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "one"}]}},
    "{no JSON",
    {"id": "long", "prompt": "one " * 400},
    {"prompt": "two one", "temperature": 0.5},
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with ROWS in the file `in`."""
    monkeypatch.chdir(tmp_path)
    write(ROWS)
    return tmp_path


def write(rows: Iterable[Mapping[str, Any] | str]) -> None:
    Path("in").write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))


def answer(row: Mapping[str, Any]) -> str:
    """The text, or the code of the error."""
    choice = row["response"] and row["response"]["body"]["choices"][0]
    found = row["error"]["code"] if row["error"] else choice.get("text") or choice["message"]["content"]
    return str(found)


def answers(*names: str) -> dict[str, str]:
    """Answers by id, or by line where a row has no id; each is there once."""
    rows = [json.loads(line) for name in names for line in Path(name).read_bytes().splitlines()]
    found = {row["custom_id"] or f"line {row['error']['line']}": answer(row) for row in rows}
    assert len(found) == len(rows)
    return found


def test_results_are_those_of_batch(here: Path, tiny_llm: FusedLlama) -> None:
    done = run_file(tiny_llm, "in", "out", max_tokens=4)
    requests = [row for row in ROWS if not isinstance(row, str)]
    requests[-1] = {**requests[-1], "id": "7"}
    rows = list(tiny_llm.batch(requests, max_tokens=4))
    assert answers("out") == {"line 5": "invalid_json", **{row["custom_id"]: answer(row) for row in rows}}
    assert (answers("out")["hot"], answers("out")["long"]) == ("invalid_request", "context_length_exceeded")
    assert done.report("completed")["request_counts"] == {"total": 7, "completed": 4, "failed": 3}
    usages = [row["response"]["body"]["usage"] for row in rows if row["response"]]
    assert done.n_tokens == sum(usage["completion_tokens"] for usage in usages)


def test_nothing_is_run_twice(here: Path, tiny_llm: FusedLlama) -> None:
    run_file(tiny_llm, "in", "out", max_tokens=4)
    before, seen = Path("out").read_bytes(), []
    again = run_file(tiny_llm, "in", "out", max_tokens=4, on_progress=seen.append)
    assert (again.n_before, again.n_done, again.n_tokens, seen) == (7, 7, 0, [])
    assert Path("out").read_bytes() == before


@pytest.mark.parametrize("by", ["exception", "interrupt"])
def test_an_interrupted_run_is_continued(here: Path, tiny_llm: FusedLlama, by: str) -> None:
    run_file(tiny_llm, "in", "whole", max_tokens=4)

    def stop(progress: Progress) -> None:
        if progress.n_done - progress.n_before == 2 and progress.n_done < 7:
            if by == "exception":
                raise KeyboardInterrupt
            tiny_llm.interrupt()

    n_runs = n_before = 0
    while True:
        try:
            done = run_file(tiny_llm, "in", "out", max_tokens=4, on_progress=stop)
            break
        except (KeyboardInterrupt, RequestInterruptedError):
            n_runs += 1
            assert len(answers("out")) > n_before
            n_before = len(answers("out"))
    assert n_runs > 1
    assert (done.n_before, done.n_done) == (n_before, 7)
    assert answers("out") == answers("whole")


def test_failed_rows_have_a_file_and_are_retried(here: Path, tiny_llm: FusedLlama) -> None:
    files = {"input": "in", "output": "out", "errors": "bad"}
    run_file(tiny_llm, **files, max_tokens=4)
    assert answers("bad").keys() == {"hot", "long", "line 5"}
    done = run_file(tiny_llm, **files, max_tokens=4, retry_errors=True)
    assert (done.n_before, done.n_failed) == (4, 3)
    assert answers("out", "bad").keys() == {"a", "b", "hot", "c", "line 5", "long", "7"}


def test_ordered(here: Path, tiny: Path) -> None:
    write({"id": str(n), "prompt": "one", "max_tokens": 9 - n} for n in range(8))
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1, n_parallel=8) as llm:
        run_file(llm, "in", "out", ordered=True)
    assert list(answers("out")) == [str(n) for n in range(8)]


def test_an_output_belongs_to_what_it_was_begun_with(here: Path, tiny_llm: FusedLlama) -> None:
    run_file(tiny_llm, "in", "out", max_tokens=4, draft="off")
    before = Path("out").read_bytes()
    with pytest.raises(InvalidParameterError, match="was begun with something else: max_tokens was 4, now 5"):
        run_file(tiny_llm, "in", "out", max_tokens=5)
    with pytest.raises(InvalidParameterError, match="in: is the input"):
        run_file(tiny_llm, "in", "in")
    assert Path("out").read_bytes() == before
    run_file(tiny_llm, "in", "out", max_tokens=5, restart=True)
    assert Path("out.1").read_bytes() == before


def test_the_command_line_continues_it(here: Path, tiny: Path, tiny_llm: FusedLlama) -> None:
    write(ROWS[:3])
    run_file(tiny_llm, "in", "out", max_tokens=4)
    write(ROWS)
    args = ["-f", str(tiny), "--raw", "--max-tokens", "4", "--ctx-size", "256", "--threads", "1", "--json"]
    result = CliRunner().invoke(main, ["batch", "in", "-o", "out", *args])
    assert json.loads(result.stdout)["n_before"] == 3
    run_file(tiny_llm, "in", "whole", max_tokens=4)
    assert answers("out").keys() == answers("whole").keys()


def test_columns_are_kept_beside_answers_and_errors(here: Path, tiny_llm: FusedLlama) -> None:
    own = {"answer": "42", "response": {"a": [1, None]}, "metadata": {"set": "test"}, "url": "https://example.com"}
    body = {"prompt": "one", "max_tokens": 2}
    write(
        [
            {"id": "a", "prompt": "one", "temperature": 0, **own},
            {"id": "failed", "prompt": "one", "temperature": "hot", **own},
            {"custom_id": "c", "url": "/v1/completions", "body": body, "answer": "43"},
            {"id": "none", "prompt": "one"},
        ]
    )
    run_file(tiny_llm, "in", "out", keep=True, max_tokens=2, errors="failed")
    lines = Path("out").read_text() + Path("failed").read_text()
    rows = {row["custom_id"]: row for row in map(json.loads, lines.splitlines())}
    assert {name: row["columns"] for name, row in rows.items()} == {
        "a": own, "failed": own, "c": {"answer": "43"}, "none": {}
    }  # fmt: skip
    assert rows["a"]["response"]["body"]["choices"] == rows["none"]["response"]["body"]["choices"]
    run_file(tiny_llm, "in", "without", max_tokens=2)
    assert "columns" not in Path("without").read_text()


def test_ids_of_pandas_are_whole_numbers(here: Path, tiny_llm: FusedLlama) -> None:
    write([{"id": 1.0, "prompt": "one", "max_tokens": 2.0}, {"id": 2, "prompt": "one"}, {"id": 2.5, "prompt": "one"}])
    run_file(tiny_llm, "in", "out", max_tokens=2)
    assert answers("out").keys() == {"1", "2", "line 3"}
    assert answers("out")["line 3"] == "invalid_request"
    before = Path("out").read_bytes()
    run_file(tiny_llm, "in", "out", max_tokens=2)
    assert Path("out").read_bytes() == before
