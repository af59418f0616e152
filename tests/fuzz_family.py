"""Hostile family.toml files: each is a family, or refused in one line, and settings can be written into each family.

`python -m tests.guided family --minutes 60` runs many that are guided by coverage; `test_fuzz.py` a few.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from edge_dlf.errors import FamilyError, InvalidParameterError
from edge_dlf.families.defaults import write_settings
from edge_dlf.families.spec import FamilySpec

from .guided import drawn, limits

WRITTEN: Mapping[str | None, Mapping[str, Any]] = {
    None: {"temperature": 0.25, "top_k": None, "alpha": {"maths": 2.0}},
    "fast": {"method": "weighted", "weights": {"large": 1.0, "maths": -0.5}},
}

_texts = st.sampled_from(
    ["maths", "fast", "large", "a.gguf", "", "a" * 64, "../x", "~", "é", "\0", "\n", "o/r", "static"]
)
_numbers = st.integers(-2, 9) | st.floats() | st.sampled_from([2**63, -(2**70), 1e308, 10**400])
_values = st.recursive(
    st.booleans() | _numbers | _texts | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts | st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def _mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 15).flatmap(lambda n: right if n < 15 else _values)


_paths = _mostly(st.sampled_from(["large.gguf", "/a/b.gguf", "~/x.gguf", "é 1.gguf"]))
_hashes = _mostly(st.just("a" * 64) | st.lists(st.just("B" * 64), max_size=2))
_sources = st.fixed_dictionaries({"path": _paths}, optional={"sha256": _hashes}) | st.fixed_dictionaries(
    {"repo": _mostly(st.just("o/r")), "file": _mostly(st.sampled_from(["x.gguf", "d/x-00001-of-00002.gguf"]))},
    optional={"revision": _mostly(st.just("main")), "sha256": _hashes},
)
_loras = st.fixed_dictionaries(
    {"lora": _mostly(_paths | st.lists(_paths, min_size=1, max_size=2))},
    optional={"scale": _mostly(st.floats(-2, 2) | st.lists(st.integers(0, 2), min_size=1, max_size=2))},
)
_experts = st.tuples(
    _mostly(st.sampled_from(["maths", "code", "x-1"])), st.none() | st.booleans() | _texts, _loras | _sources
).map(lambda parts: {"name": parts[0], **({} if parts[1] is None else {"as_corrector": parts[1]}), **parts[2]})
_settings = st.fixed_dictionaries(
    {},
    optional={
        "method": _mostly(st.sampled_from(["dynamic", "static", "weighted", "large", "maths"])),
        "alpha": _mostly(st.floats(-2, 2) | st.just("match") | st.dictionaries(st.just("maths"), st.floats(-2, 2))),
        "weights": _mostly(st.dictionaries(st.sampled_from(["large", "base", "maths"]), st.floats(-2, 2))),
        "temperature": _mostly(st.floats(0, 2)), "top_k": _mostly(st.integers(-1, 50)), "stop": _mostly(_texts),
        "logit_bias": _mostly(st.dictionaries(st.integers(0, 99).map(str), st.floats(-9, 9), max_size=2)),
        "seed": _mostly(st.integers(-1, 9)), "think": _mostly(st.just("auto")), "max_tokens": _values,
        "search": _mostly(st.sampled_from(["grid", "exact"])), "plausibility": _mostly(st.floats(0, 1)), "zzz": _values,
    },
)  # fmt: skip
_tables = st.fixed_dictionaries(
    {
        "name": _mostly(st.just("f")),
        "large": _mostly(_sources),
        "base": _mostly(_sources),
        "experts": _mostly(st.lists(_experts, min_size=1, max_size=2)),
    },
    optional={
        "defaults": _mostly(_settings),
        "profiles": _mostly(
            st.dictionaries(_mostly(st.sampled_from(["fast", "exact.1"])).map(str), _settings, max_size=2)
        ),
        "examples": _mostly(st.lists(_texts, max_size=2)),
        "zzz": _values,
    },
)


def _key(name: str) -> str:
    return name if name.isascii() and name.isalnum() else json.dumps(name, ensure_ascii=False)


def _inline(value: Any) -> str:
    """A value as TOML writes it within a line, or something near to it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(str(name))} = {_inline(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _lines(table: Mapping[str, Any], styles: Iterator[int], above: tuple[str, ...] = ()) -> Iterator[str]:
    """The table's lines: tables in it within a line, by keys with dots, or under headers, which come last."""
    under_headers = []
    for name, value in table.items():
        style = next(styles)
        are_tables = isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value)
        if isinstance(value, Mapping) and value and style == 1:
            yield from (f"{_key(name)}.{_key(str(key))} = {_inline(each)}" for key, each in value.items())
        elif (are_tables or isinstance(value, Mapping)) and style:
            under_headers.append((name, value))
        else:
            yield f"{_key(name)} = {_inline(value)}{'  # a remark' if style == 3 else ''}"
    for name, value in under_headers:
        header = ".".join(map(_key, (*above, name)))
        for each in value if isinstance(value, list) else [value]:
            yield f"[[{header}]]" if isinstance(value, list) else f"[{header}]"
            yield from _lines(each, styles, (*above, name))


def _content(table: Mapping[str, Any], styles: list[int], end: str, mark: str) -> bytes:
    text = mark + end.join([*_lines(table, iter(styles + [2] * 999)), ""])
    return text.encode("utf-8", "surrogatepass")


_files = st.builds(
    _content,
    _tables,
    st.lists(st.integers(0, 4), max_size=20),
    st.sampled_from(["\n", "\n", "\r\n", "\n\n"]),
    st.sampled_from(["", "", "", "\ufeff", "# remark\n"]),
)
_cut = st.builds(lambda content, start, n: content[:start] + content[start + n :], _files, *2 * [st.integers(0, 400)])
files = st.integers(0, 9).flatmap(lambda n: _files if n < 8 else _cut if n == 8 else st.binary(max_size=40))


def require_one_line(error: Exception) -> None:
    if "\n" in str(error):
        raise AssertionError(f"a reason in two lines: {error}")


def _checked(path: Path, content: bytes) -> str:
    """What came of a file: "refused", "a family", or one "with settings" that have been written into it."""
    path.write_bytes(content)
    try:
        family = FamilySpec.load(path)
    except FamilyError as error:
        require_one_line(error)
        return "refused"
    try:
        write_settings(path, WRITTEN)
    except (FamilyError, InvalidParameterError) as error:
        require_one_line(error)
        assert path.read_bytes() == content
        return "a family"
    changed = FamilySpec.load(path)
    assert (changed.name, changed.sources, changed.examples) == (family.name, family.sources, family.examples)
    for profile, own in WRITTEN.items():
        before, after = (spec.profiles.get(profile, {}) if profile else spec.defaults for spec in (family, changed))
        right = {name: value for name, value in {**before, **own}.items() if name not in own or value is not None}
        # NaN is not equal to itself, but is written as itself.
        assert {name: repr(value) for name, value in after.items()} == {
            name: repr(value) for name, value in right.items()
        }
    return "with settings"


def property_of(folder: Path, tally: Counter[str]) -> Callable[..., None]:
    """The property of files, to be decorated."""

    def holds(content: bytes) -> None:
        tally[_checked(folder / "family.toml", content)] += 1

    return given(files)(holds)


@contextmanager
def cases(_: str, folder: Path, tally: Counter[str]) -> Iterator[tuple[Callable[[bytes], object], list[bytes]]]:
    """For `guided.py`."""
    yield limits()(property_of(folder, tally)).hypothesis.fuzz_one_input, drawn()  # type: ignore[attr-defined]


def run(n_cases: int) -> Counter[str]:
    """Check this many files, always the same. Raises what the first that fails raises; returns how they ended."""
    tally: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        limits(max_examples=n_cases, derandomize=True)(property_of(Path(folder), tally))()
    return tally
