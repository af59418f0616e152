"""GBNF grammars through llguidance describe the texts that they describe by GBNF's own rules, and no others."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator

import pytest

from edge_dlf.answers.forms import Forms
from edge_dlf.answers.gbnf import lark_of

BYTES = [bytes([byte]) for byte in range(256)]
END = 256
ALPHABET, LONGEST = "ab", 5


@pytest.fixture(scope="module")
def forms() -> Iterator[Forms]:
    forms = Forms([*BYTES, b""], [END])
    yield forms
    forms.close()


def accepts(forms: Forms, grammar: str, text: str) -> bool:
    """Whether the grammar's form takes a text byte by byte, and lets the answer end there."""
    form = forms.grammar(grammar)
    for byte in text.encode():
        if form.banned([], byte, None) is not None:
            return False
        form.accept(byte)
    return form.banned([], END, None) is None


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        ('root ::= ("ab" | "abc") "cd"', ["abcd", "abccd"], ["abc", "abd"]),
        ('root ::= [a-z]* "b" root2?\nroot2 ::= "(" root ")"', ["b", "abb", "ab(b)"], ["a", "ab(", ""]),
        ('root ::= "[(" | ")]" # ((((', ["[(", ")]"], ["[", "(("]),
        ('\ufeffroot ::= "a"', ["a"], [""]),
        ('# )))\nroot ::= "#" "a" # "b"\n', ["#a"], ["#ab"]),
        ('root ::= "\\x41\\u00e9\\U0001F600\\n\\t\\\\\\"\\[\\]"', ['Aé😀\n\t\\"[]'], ["A"]),
        ("root ::= [^a-y\\n\\]] [--9] [a-]", ["z-a", "é5-"], ["a-a", "\n-a", "z:a", "]-a"]),
        ("root ::= . .", ["\n😀", "é]"], ["a", "abc"]),
        ('root ::= "a"{2} "b"{1,} "c"{0,2} "d"{0,0}', ["aab", "aabbcc"], ["ab", "aabccc", "aabd"]),
        ('root ::= ws "x"\nws ::= ([ \\t\\n] ws)?', ["x", "  \n\tx"], [" "]),
        ('root ::= item ("," root)?\nitem ::= [0-9]+', ["1", "1,22,3"], ["", "1,", ",1"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a", ""]),
        ('root ::= x |\n  y # or\n  | "c"\nx ::= "a"\r\ny ::= "b"', ["a", "b", "c"], ["ab"]),
        ('root ::= "a" dead | "b"\ndead ::= "c" dead', ["b"], ["a", "ac"]),
        ('root ::= "a" | [] | "b" []', ["a"], ["b"]),
        ("root ::= ((((((((((((((((((((" + '"a"' + "))))))))))))))))))))", ["a"], ["aa"]),
        ('root ::= "old"\nroot ::= "new"', ["new"], ["old"]),
        ("root ::= " + " | ".join(f'"{n}"' for n in range(3000)), ["0", "2999"], ["3000"]),
        ('root ::= ""', [""], ["a"]),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_a_grammar_describes_these_texts(forms: Forms, grammar: str, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not accepts(forms, grammar, text)] == []
    assert [text for text in wrong if accepts(forms, grammar, text)] == []


@pytest.mark.parametrize(
    ("grammar", "complaint"),
    [
        ("", "no rule root"),
        ("# nothing\n", "no rule root"),
        ("root = x", "expecting ::="),
        ('root ::= "a', "cannot be read, in line 1"),
        ('root ::= "a"\nb ::= @', "cannot be read, in line 2"),
        ('root ::= "\\q"', "unknown escape"),
        ("root ::= \n  missing", "undefined rule 'missing', in line 2"),
        ('root ::= ("a"', "a ( without its )"),
        ('root ::= "a")', "a ) without its ("),
        ('root ::= * "a"', "nothing to repeat"),
        ('root ::= "a"{3,2}', "wrong order"),
        ('root ::= "\\ud800"', "no character"),
        ('root ::= "\\U00110000"', "no character"),
        ('root ::= root "a"', "no text that ends"),
        ('root ::= a\na ::= b "x"\nb ::= a', "no text that ends"),
        ("root ::= []", "no text that ends"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(grammar: str, complaint: str) -> None:
    with pytest.raises(ValueError, match="(?s).*") as caught:
        lark_of(grammar)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


class Random:
    """A random grammar over the letters a and b, and the texts of at most LONGEST letters that it describes.

    A rule is a tree: a letter text, (rule name,), ["|" | "", tree, …], or (tree, least, most).
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.names = ["root", *string.ascii_lowercase[: self.random.randint(0, 3)]]
        self.rules = {name: self.tree(3) for name in self.names}

    def tree(self, depth: int) -> object:
        kind = self.random.choice(["text", "text", "name", "seq", "or", "times"] if depth else ["text", "name"])
        if kind == "text":
            return "".join(self.random.choices(ALPHABET, k=self.random.choice([0, 1, 1, 2, 3])))
        if kind == "name":
            return (self.random.choice(self.names),)
        if kind == "times":
            return (self.tree(depth - 1), *self.random.choice([(0, 1), (0, None), (1, None), (0, 2), (2, 3)]))
        return ["|" if kind == "or" else "", *(self.tree(depth - 1) for _ in range(self.random.randint(1, 3)))]

    def text(self) -> str:
        return "\n".join(f"{name} ::= {self.written(tree)}" for name, tree in self.rules.items())

    def written(self, tree: object) -> str:
        if isinstance(tree, str):
            return f'"{tree}"'
        if isinstance(tree, list):
            return "(" + f" {tree[0]} ".join(map(self.written, tree[1:])) + ")"
        assert isinstance(tree, tuple)
        if len(tree) == 1:
            return str(tree[0])
        return f"({self.written(tree[0])}){{{tree[1]},{'' if tree[2] is None else tree[2]}}}"

    def texts(self) -> set[str]:
        known: dict[str, set[str]] = {name: set() for name in self.names}
        while True:
            found = {name: self.of(tree, known) for name, tree in self.rules.items()}
            if found == known:
                return known["root"]
            known = found

    def of(self, tree: object, known: dict[str, set[str]]) -> set[str]:
        if isinstance(tree, str):
            return {tree} if len(tree) <= LONGEST else set()
        if isinstance(tree, list) and tree[0]:
            return set().union(*(self.of(each, known) for each in tree[1:]))
        if isinstance(tree, list):
            texts = {""}
            for each in tree[1:]:
                texts = joined(texts, self.of(each, known))
            return texts
        assert isinstance(tree, tuple)
        if len(tree) == 1:
            return known[tree[0]]
        once, texts, found = self.of(tree[0], known), {""}, set[str]()
        for n in range(LONGEST + 4 if tree[2] is None else tree[2] + 1):
            found |= texts if n >= tree[1] else set()
            texts = joined(texts, once)
        return found


def joined(left: set[str], right: set[str]) -> set[str]:
    return {a + b for a in left for b in right if len(a + b) <= LONGEST}


def described(forms: Forms, grammar: str) -> set[str]:
    """The texts of at most LONGEST letters that the grammar's form takes."""
    found: set[str] = set()
    left = [""]
    form = forms.grammar(grammar)
    while left:
        text = left.pop()
        ahead = list(text.encode())
        if form.banned(ahead, END, None) is None:
            found.add(text)
        if len(text) < LONGEST:
            left += [text + char for char in ALPHABET if form.banned(ahead, ord(char), None) is None]
    return found


@pytest.mark.parametrize("seeds", [range(200), pytest.param(range(200, 5000), marks=pytest.mark.exhaustive)])
def test_random_grammars_describe_what_they_should(forms: Forms, seeds: range) -> None:
    n_described = 0
    for seed in seeds:
        grammar = Random(seed)
        expected = grammar.texts()
        try:
            found = described(forms, grammar.text())
        except ValueError:
            found = set()
        assert found == expected, grammar.text()
        n_described += bool(expected)
    assert n_described > len(seeds) // 2
