"""Batches of hostile lines: each line that is not blank has one row, whatever it holds and wherever a run is cut.

`python -m tests.fuzz_batch --examples 20000` runs many, `python -m tests.guided batch --minutes 60` many more that are
guided by coverage, and `test_fuzz_batch.py` a few.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edge_dlf import FusedLlama
from edge_dlf.batch import run_file
from edge_dlf.system.jsonl import read_lines

from .guided import drawn, limits
from .tiny import tiny_lora, tiny_model

FIELDS = (
    "id", "custom_id", "prompt", "messages", "body", "url", "method", "temperature", "top_k", "top_p", "seed", "stop",
    "logprobs", "top_logprobs", "n", "stream", "edge_dlf", "logit_bias", "user", "answer", "echo", "max_tokens",
)  # fmt: skip
_texts = st.text(max_size=12) | st.sampled_from(["", "the cat", "\ud800", "\0", "é", "<s>", "a\u2028b", "x" * 400])
_numbers = st.integers(-2, 9) | st.floats() | st.sampled_from([2**63, -(2**64), 1e308, 10**400])
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts | st.sampled_from(FIELDS), inner, max_size=3),
    max_leaves=8,
)
_messages = st.lists(
    st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | _values})
    | st.fixed_dictionaries({"role": st.just("user"), "content": _texts | _values}),
    max_size=3,
)
_requests = (
    st.fixed_dictionaries({"prompt": _texts}, optional={"id": _texts, "seed": _numbers})
    | st.fixed_dictionaries(
        {"prompt": _texts | _values}, optional=dict.fromkeys(FIELDS[7:-1], _values) | {"id": _values}
    )
    | st.fixed_dictionaries({"messages": _messages}, optional={"id": _values, "stop": _values})
    | st.fixed_dictionaries(
        {
            "custom_id": st.sampled_from("ab") | _values,
            "url": st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
        },
        optional={"body": _values | st.fixed_dictionaries({"prompt": _texts, "messages": _messages})},
    )
    | st.dictionaries(st.sampled_from(FIELDS), _values, max_size=4)
)
_lines = (
    _requests.map(lambda request: json.dumps(request).encode())
    | _requests.map(lambda request: json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | st.builds(lambda request, n: json.dumps(request).encode()[:n], _requests, st.integers(0, 60))
    | _values.map(lambda value: json.dumps(value).encode())
    | st.binary(max_size=12)
    | st.sampled_from(
        [b"", b"  \t", b"{", b"[" * 2000, b'{"a":' * 2000, b'{"prompt": "a", "prompt": "b"}', b"\xff\xfe{"]
    )
)
_breaks = st.sampled_from([b"\n", b"\r\n", b"\n\n"])
batches = st.lists(st.tuples(_lines, _breaks), max_size=6).map(lambda parts: b"".join(map(b"".join, parts)))


def outcome(path: Path) -> dict[str, Any]:
    """Row by id, or by line: its answer, or the code of its error. Raises AssertionError where one is there twice."""
    rows: dict[str, Any] = {}
    for line in path.read_bytes().splitlines():
        row = json.loads(line)
        key = row["custom_id"] if row["custom_id"] is not None else f"line {row['error']['line']}"
        key = f"{key} {row['custom_id'] is None}"
        assert key not in rows
        rows[key] = row["error"]["code"] if row["error"] else row["response"]["body"]["choices"]
    return rows


def check(llm: FusedLlama, folder: Path, content: bytes, cut: int, ordered: bool) -> Counter[str]:
    """Run a batch, cut its output and run it again. Returns the kinds of rows."""
    source, output = folder / "in", folder / "out"
    for path in folder.iterdir():
        path.unlink()
    source.write_bytes(content)
    if content.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"\x1f\x8b", b"BZh", b"PK\3\4")):
        return Counter()
    arguments: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "raw": False, "exact": True, "ordered": ordered}
    with source.open("rb") as file:
        n_lines = sum(1 for _ in read_lines(file))
    done = run_file(llm, source, output, **arguments)
    whole = outcome(output)
    assert len(whole) == done.n_done == n_lines
    output.write_bytes(output.read_bytes()[: cut % (output.stat().st_size + 1)])
    run_file(llm, source, output, **arguments)
    assert outcome(output) == whole
    if ordered:
        assert list(outcome(output)) == list(whole)
    return Counter(value if isinstance(value, str) else "answered" for value in whole.values())


def property_of(llm: FusedLlama, folder: Path, tally: Callable[[Counter[str]], None]) -> Callable[..., None]:
    """The property of batches, to be decorated."""

    def holds(content: bytes, cut: int, ordered: bool) -> None:
        tally(check(llm, folder, content, cut, ordered))

    return given(batches, st.integers(0, 2000), st.booleans())(holds)


@contextmanager
def tiny_family(folder: Path) -> Iterator[FusedLlama]:
    """Three models of a few kilobytes, written to `folder`."""
    tiny_model(folder / "large.gguf", seed=1)
    tiny_model(folder / "base.gguf", seed=2)
    tiny_lora(folder / "lora.gguf", seed=3)
    members: Any = folder / "large.gguf", folder / "base.gguf", {"lora": folder / "lora.gguf"}
    logging.disable(logging.WARNING)  # notices about every cut
    with FusedLlama(*members, n_ctx=64, n_threads=1) as llm:
        yield llm


@contextmanager
def cases(_: str, folder: Path, tally: Counter[str]) -> Iterator[tuple[Callable[[bytes], object], list[bytes]]]:
    """For `guided.py`."""
    batch = folder / "batch"
    batch.mkdir()
    with tiny_family(folder) as llm:
        yield limits()(property_of(llm, batch, tally.update)).hypothesis.fuzz_one_input, drawn()  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20000)
    n_examples, total, n = parser.parse_args().examples, Counter[str](), Counter[str]()

    def tally(kinds: Counter[str]) -> None:
        total.update(kinds)
        n["batches"] += 1

    with (
        tempfile.TemporaryDirectory() as models,
        tempfile.TemporaryDirectory() as folder,
        tiny_family(Path(models)) as llm,
    ):
        limits(max_examples=n_examples)(property_of(llm, Path(folder), tally))()
    print(f"{n['batches']:,} batches, {sum(total.values()):,} lines: {dict(total.most_common())}")


if __name__ == "__main__":
    main()
