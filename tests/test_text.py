"""MessageStream without a parser: characters and stop strings that span tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_dlf.answers.message import MessageStream


def shown(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[str, bool]:
    stream = MessageStream(stop)
    text = ""
    for piece in pieces:
        text += stream.push(piece).text
        if stream.stopped:
            break
    return text + stream.finish().text, stream.stopped


def test_a_character_appears_once_its_last_byte_has_come() -> None:
    stream = MessageStream()
    parts = [stream.push(bytes([byte])).text for byte in "é😀!".encode()]
    assert parts == ["", "é", "", "", "", "😀", "!"]


def test_an_unfinished_character_becomes_the_replacement_character() -> None:
    assert shown([b"a", "😀".encode()[:2]]) == ("a\ufffd", False)


def test_invalid_bytes_do_not_swallow_what_follows() -> None:
    assert shown([b"\xffok"]) == ("\ufffdok", False)


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        ([b"one ST", b"OP two"], ("STOP",), ("one ", True)),
        ([b"S", b"T", b"O", b"X"], ("STOP",), ("STOX", False)),
        ([b"a\n", b"\nb"], ("\n\n",), ("a", True)),
        ([b"aab"], ("ab", "b"), ("a", True)),
        ([b"ab"], ("abc",), ("ab", False)),
        ([b"xaaab"], ("aab",), ("xa", True)),
        (["né".encode()[:2], "né".encode()[2:] + b"!"], ("é!",), ("n", True)),
    ],
)
def test_stop_strings(pieces: list[bytes], stop: tuple[str, ...], expected: tuple[str, bool]) -> None:
    assert shown(pieces, stop) == expected


def test_a_possible_stop_string_is_held_back_and_then_released() -> None:
    stream = MessageStream(("END",))
    assert [stream.push(piece).text for piece in (b"x E", b"N", b"X")] == ["x ", "", "ENX"]
    assert not stream.holding


@given(
    st.text(alphabet="abé😀", max_size=30),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=3), max_size=3),
    st.data(),
)
def test_any_split_shows_the_text_before_the_first_stop_string(text: str, stop: list[str], data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    ends = [text.find(s) for s in stop if s in text]
    # A stop string is seen as soon as its last character has come, so the one that ends first wins.
    result, stopped = shown(pieces, tuple(stop))
    assert stopped == bool(ends)
    assert text.startswith(result)
    if not ends:
        assert result == text
    else:
        assert not any(s in result for s in stop)
