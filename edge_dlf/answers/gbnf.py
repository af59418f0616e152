"""llama.cpp's GBNF grammars, rewritten as rules of llguidance's dialect of Lark.

A grammar becomes rules over single characters, so that it describes exactly the same texts: llguidance matches longer
terminals greedily, and would not find "ab" "cd" in `("ab" | "abc") "cd"`. Groups become rules of their own. What can
derive no text is left out, so that no answer gets to where it cannot go on. Rules that end with themselves are written
as repetitions, which take less time and memory.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import NamedTuple, NoReturn, TypeAlias

OPTIONS = '%llguidance {"no_forcing": true}\n'
"""How a grammar of llguidance begins. Where it leaves one text only, every token that begins this text is allowed."""
_TOKENS = re.compile(
    r"""(?P<skip>\s+ | \#[^\r\n]*)
    | (?P<define>(?P<defined>[A-Za-z0-9_-]+)[ \t]*::=)
    | (?P<name>[A-Za-z0-9_-]+)
    | (?P<literal>"(?:[^"\\]|\\.)*")
    | (?P<set>\[(?:[^\]\\]|\\.)*\] | \.)
    | (?P<token><\[[0-9]+\]>)
    | (?P<times>[*+?] | \{[ ]*[0-9]+[ ]*(?:,[ ]*[0-9]*[ ]*)?\})
    | (?P<sign>[()|])""",
    re.VERBOSE | re.DOTALL,
)
_CHARACTER = re.compile(
    r"""\\(?:x([0-9A-Fa-f]{2}) | u([0-9A-Fa-f]{4}) | U([0-9A-Fa-f]{8}) | ([trn\\"\[\]])) | ([^\\])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPES = {"t": "\t", "r": "\r", "n": "\n"}
_TIMES: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_LAST = 0x10FFFF
_SURROGATES = range(0xD800, 0xE000)
_MOST_TAILS = 100
"""Alternatives up to which a rule that ends with itself is written as a repetition."""


class Item(NamedTuple):
    """A symbol, repeated `least` to `most` times; without bound where `most` is None.

    symbol: the name of a rule, which has a blank in it for a group, or a terminal as Lark writes it.
    """

    symbol: str
    least: int = 1
    most: int | None = 1


Alternative: TypeAlias = tuple[Item, ...]
Rules: TypeAlias = dict[str, list[Alternative]]


def lark_of(grammar: str) -> str:
    """Return the same grammar in Lark. Raises ValueError, which says in one line what is wrong with it."""
    rules = _productive(_Parser(grammar.removeprefix("\ufeff")).rules)
    if "root" not in rules:
        raise ValueError("root describes no text that ends")
    for name in list(rules):
        _shorten_tail(name, rules)
    return _written(rules)


class _Parser:
    """Reads the rules of a grammar, with groups as rules of their own.

    The rule and the groups that are being read are on a stack: their name, their alternatives so far, and the last one.
    """

    def __init__(self, text: str) -> None:
        self.rules: Rules = {}
        self._text, self._at = text, 0
        self._stack: list[tuple[str, list[Alternative], list[Item]]] = []
        used: dict[str, int] = {}
        while self._at < len(text):
            match = _TOKENS.match(text, self._at)
            if not match or not (self._stack or match["skip"] or match["define"]):
                self._fail("expecting ::= after the name of a rule" if not self._stack else "this cannot be read")
            if match["name"]:
                used.setdefault(match["name"], self._at)
            if not match["skip"]:
                self._take(match)
            self._at = match.end()
        self._end_rule()
        if "root" not in self.rules:
            self._fail("there is no rule root")
        for name, self._at in used.items():
            if name not in self.rules:
                self._fail(f"undefined rule {name!r:.60}")

    def _take(self, token: re.Match[str]) -> None:
        if token["define"]:
            self._end_rule()
            self._stack = [(token["defined"], [], [])]
            return
        name, alternatives, items = self._stack[-1]
        if token["name"] or token["token"]:
            items.append(Item(token[0]))
        elif token["literal"]:
            items += self._literal(token[0])
        elif token["set"]:
            items.append(Item(self._set(token[0])))
        elif token["times"]:
            if not items:
                self._fail("there is nothing to repeat")
            items.append(self._repeated(items.pop(), token[0]))
        elif token[0] == "(":
            self._stack.append((f"group {self._at}", [], []))
        else:
            alternatives.append(tuple(items))
            items.clear()
            if token[0] == ")":
                if len(self._stack) == 1:
                    self._fail("a ) without its (")
                self._stack.pop()
                if len(alternatives) == len(alternatives[0]) == 1:
                    self._stack[-1][2].append(alternatives[0][0])
                else:
                    self.rules[name] = alternatives
                    self._stack[-1][2].append(Item(name))

    def _end_rule(self) -> None:
        if len(self._stack) > 1:
            self._fail("a ( without its )")
        for name, alternatives, items in self._stack:
            self.rules[name] = [*alternatives, tuple(items)]

    def _repeated(self, item: Item, token: str) -> Item:
        least, most = _TIMES.get(token, (0, 0))
        if token[0] == "{":
            low, comma, high = (part.strip() for part in token[1:-1].partition(","))
            least, most = int(low), int(high) if high else None if comma else int(low)
            if most is not None and most < least:
                self._fail("the bounds of a repetition are in the wrong order")
        if item[1:] != (1, 1):
            group = f"again {self._at}"
            self.rules[group] = [(item,)]
            item = Item(group)
        return item._replace(least=least, most=most)

    def _set(self, token: str) -> str:
        """Return the terminal of a set of characters, such as [^a-z] or a dot."""
        if token == ".":
            return _terminal([(0, _LAST)])
        is_negated, at = token[1] == "^", 1
        ranges = []
        at += is_negated
        while at < len(token) - 1:
            first, at = self._character(token, at)
            last = first
            if token[at] == "-" and at + 1 < len(token) - 1:
                last, at = self._character(token, at + 1)
            ranges.append((first, last))
        return _terminal(_others(ranges) if is_negated else ranges)

    def _literal(self, token: str) -> Iterator[Item]:
        at = 1
        while at < len(token) - 1:
            code, at = self._character(token, at)
            yield Item(_terminal([(code, code)]))

    def _character(self, token: str, at: int) -> tuple[int, int]:
        """Return the code of the character that begins at `at`, and where it ends."""
        match = _CHARACTER.match(token, at)
        if not match:
            self._fail(f"unknown escape {token[at : at + 2]!r}")
        digits = match[1] or match[2] or match[3]
        code = int(digits, 16) if digits else ord(_ESCAPES.get(match[4], match[4]) if match[4] else match[5])
        if code > _LAST or code in _SURROGATES:
            self._fail(f"U+{code:04X} is no character")
        return code, match.end()

    def _fail(self, reason: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise ValueError(f"{reason}, in line {line} at {self._text[self._at : self._at + 20]!r}")


def _terminal(ranges: Iterable[tuple[int, int]]) -> str:
    """Return the terminal of characters in any of the ranges; of none, a symbol that no rule has."""
    parts = []
    for first, last in ranges:
        for low, high in ((first, min(last, _SURROGATES[0] - 1)), (max(first, _SURROGATES[-1] + 1), last)):
            if low <= high:
                parts.append(f"\\x{{{low:x}}}" + (f"-\\x{{{high:x}}}" if low < high else ""))
    return f"/[{''.join(parts)}]/" if parts else "no character"


def _others(ranges: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of all other characters."""
    start = 0
    for first, last in sorted(ranges):
        if first > start:
            yield start, first - 1
        start = max(start, last + 1)
    if start <= _LAST:
        yield start, _LAST


def _is_terminal(symbol: str) -> bool:
    return symbol[0] in "/<"


def _productive(rules: Rules) -> Rules:
    """Return the rules and alternatives that derive texts, without what is repeated no times."""
    waiting: dict[str, list[tuple[str, int]]] = defaultdict(list)
    lacking: dict[tuple[str, int], int] = {}
    found: list[str] = []
    known: set[str] = set()

    def derives(name: str) -> None:
        if name not in known:
            known.add(name)
            found.append(name)

    for name, alternatives in rules.items():
        for n, alternative in enumerate(alternatives):
            needed = {item.symbol for item in alternative if item.least and not _is_terminal(item.symbol)}
            lacking[name, n] = len(needed)
            for symbol in needed:
                waiting[symbol].append((name, n))
            if not needed:
                derives(name)
    while found:
        for name, n in waiting[found.pop()]:
            lacking[name, n] -= 1
            if not lacking[name, n]:
                derives(name)
    kept: Rules = {}
    for name in rules:
        if name in known:
            alternatives = [each for n, each in enumerate(rules[name]) if not lacking[name, n]]
            kept[name] = [
                tuple(item for item in each if item.most != 0 and (item.symbol in known or _is_terminal(item.symbol)))
                for each in alternatives
            ]
    return kept


def _shorten_tail(name: str, rules: Rules) -> None:
    """Write `a: x a | y` as `a: (x)* (y)`. Groups at the end of an alternative are looked into."""
    done: list[Alternative] = []
    tails: list[Alternative] = []
    left = list(rules[name])
    for _ in range(_MOST_TAILS):
        if not left:
            break
        alternative = left.pop()
        last = alternative[-1] if alternative else None
        if last and last.symbol == name and last[1:] in ((1, 1), (0, 1)):
            tails.append(alternative[:-1])
            done += [alternative[:-1]] if last.least == 0 else []
        elif last and last.symbol.startswith("group ") and last[1:] in ((1, 1), (0, 1)):
            left += [(*alternative[:-1], *tail) for tail in rules[last.symbol]]
            left += [alternative[:-1]] if last.least == 0 else []
        else:
            done.append(alternative)
    if tails and done and not left:
        rules[f"tail {name}"], rules[f"end {name}"] = tails, done
        rules[name] = [(Item(f"tail {name}", 0, None), Item(f"end {name}"))]


def _written(rules: Rules) -> str:
    """Return the rules that root needs, in Lark."""
    names = {"root": "start"}
    lines = []
    left = ["root"]

    def written(item: Item) -> str:
        symbol = item.symbol
        if not _is_terminal(symbol):
            if symbol not in names:
                names[symbol] = f"r{len(names)}"
                left.append(symbol)
            symbol = names[symbol]
        least, most = item.least, item.most
        return symbol if (least, most) == (1, 1) else f"{symbol}{{{least},{'' if most is None else most}}}"

    while left:
        name = left.pop()
        alternatives = dict.fromkeys(" ".join(map(written, each)) or '""' for each in rules[name])
        lines.append(f"{names[name]}: {' | '.join(alternatives)}")
    return OPTIONS + "\n".join(lines)
