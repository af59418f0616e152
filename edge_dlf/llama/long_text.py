"""Tokenizing texts on which llama.cpp by itself would crash, or take hours.

The pre-tokenizers of half of all vocabularies, those of gpt-oss, Llama 4, Mistral and DeepSeek among them, are regular
expressions of C++, which recurse once for every character of a word: 27,000 dashes overflow an ordinary stack. So a
longer text is tokenized on a thread whose stack has room for its longest word.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

from ..errors import InvalidParameterError, OutOfMemoryError

SHORT = 1024
"""Bytes of a text for whose words any stack has room."""
_MIB = 1 << 20
_BYTES_PER_CHAR = 1024
"""Bytes of the stack for each character of a word; GCC's regular expressions need 320 of them."""
_LONGEST_WORD = 1 << 20
_WORDS_END = re.compile(r"(?<=\n)(?=[^\s/])")
"""Where no word goes on. Some take in the white space behind them, and slashes that begin lines."""
_QUADRATIC = {"superbpe": re.compile(r"\d+"), "deepseek-llm": re.compile(r"[^\S\r\n]+")}
"""Pre-tokenizers of llama.cpp that read a run of such characters anew from each of its characters on."""
_MAX_READ = 20_000_000
"""Most characters that such a pre-tokenizer may read; it takes less than a second."""
_PIECE = 4096
_stack_size_lock = threading.Lock()


def check_runs(text: str, pre_tokenizer: str) -> None:
    """Raise InvalidParameterError for a text that this pre-tokenizer would read for minutes."""
    pattern = _QUADRATIC.get(pre_tokenizer)
    if pattern and sum(len(run) ** 2 for run in pattern.findall(text)) > _MAX_READ:
        raise InvalidParameterError(
            f"the text has longer runs of digits or spaces than this model's tokenizer ({pre_tokenizer}) can split"
        )


def on_deep_stack(text: str, tokenize: Callable[[], list[int]]) -> list[int]:
    """Result of `tokenize`, run on a thread whose stack has room for the words of `text`.

    Raises InvalidParameterError where a word is too long, OutOfMemoryError where there is no room for the stack.
    """
    longest = max(map(len, _WORDS_END.split(text)))
    if longest > _LONGEST_WORD:
        raise InvalidParameterError(
            f"the text has a line of {longest:,} characters; this model's tokenizer can split {_LONGEST_WORD:,}"
        )
    found: list[list[int]] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(tokenize())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="edge-dlf-tokenizer")
    with _stack_size_lock:
        before = threading.stack_size(_MIB + -(-longest * _BYTES_PER_CHAR // _MIB) * _MIB)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(f"no memory to tokenize a text with a line of {longest:,} characters") from error
        finally:
            threading.stack_size(before)
    thread.join()
    if failed:
        raise failed[0]
    return found[0]


def piece_pattern(known: str, ends: str) -> re.Pattern[str]:
    """Pattern of the pieces into which a text for SentencePiece's tokenizer is cut.

    known: the characters of all tokens. ends: the last characters of tokens that are found by their names.
    It writes any other character as bytes, and llama.cpp copies all tokens before for each of them. A cut in front of
    such a character, and not behind such a name, changes no token.
    """
    return re.compile(rf"(?s:.{{{_PIECE},}}?[^{re.escape(ends)}](?=[^{re.escape(known)}])|.+)")
