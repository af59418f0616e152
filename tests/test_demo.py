"""The family that ships: whole, small, and right where its members alone are not."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import gguf
import pytest
from click.testing import CliRunner
from tokenizers import models

from edge_dlf import FusedLlama
from edge_dlf.cli import main
from edge_dlf.families.spec import FamilySpec
from models.recipe.tokens import CONTROL, new_tokenizer

SPEC = FamilySpec.load("demo")
MAX_BYTES = 32 << 20
GOLDEN = {
    "What is 47 plus 38?": "The answer is 85.",
    "Can you sort 46, 70, 43 from smallest to largest?": "The answer is 43, 46, 70.",
    "I see 4 horses. How many legs is that?": "The answer is 16.",
    "Name the ones smaller than 59: 72, 28, 42": "The answer is 28, 42.",
    "What is 66 - 13?": "The answer is 53.",
    "What is the smallest of 23, 57, 35?": "The answer is 23.",
}


@pytest.fixture(scope="module")
def demo() -> Iterator[FusedLlama]:
    with FusedLlama.from_family("demo", n_ctx=512, n_threads=1) as llm:
        yield llm


def test_the_files_are_those_that_the_family_names() -> None:
    assert len(SPEC.sources) == 6
    for source in SPEC.sources:
        assert (hashlib.sha256(source.local_path().read_bytes()).hexdigest(),) == source.sha256


def test_it_is_small() -> None:
    folder = SPEC.large.local_path().parent
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= MAX_BYTES


@pytest.mark.parametrize("question", GOLDEN)
def test_greedy_answers(demo: FusedLlama, question: str) -> None:
    result = demo.create_chat_completion([{"role": "user", "content": question}], temperature=0, max_tokens=24)
    assert result["choices"][0]["message"]["content"] == GOLDEN[question]
    assert result["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("greeting", ["hello", "What can you do?"])
def test_it_tells_what_to_try(demo: FusedLlama, greeting: str) -> None:
    result = demo.create_chat_completion([{"role": "user", "content": greeting}], temperature=0, max_tokens=64)
    assert "Try:" in result["choices"][0]["message"]["content"]


def test_llama_cpp_splits_text_as_the_recipe_does(demo: FusedLlama) -> None:
    fields = gguf.GGUFReader(SPEC.large.local_path()).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    vocabulary = {token: n for n, token in enumerate(tokens) if token not in CONTROL}
    tokenizer = new_tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    rng = random.Random(0)
    words = [*" 0123456789\n\t.,?!'s", *(token.replace("Ġ", " ") for token in tokens if token.isascii())]
    letters = [chr(code) for code in range(32, 0x2FFF) if chr(code).isprintable()]
    for _ in range(4000):
        text = "".join(rng.choice(words if rng.random() < 0.8 else letters) for _ in range(rng.randint(1, 12)))
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert demo.tokenize(text, special=False)[1:] == ids, text


def test_it_is_what_commands_take_where_no_family_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_DLF_FAMILY", raising=False)
    question, answer = next(iter(GOLDEN.items()))
    result = CliRunner().invoke(main, ["generate", question])
    assert (result.exit_code, result.stdout) == (0, f"{answer}\n")
    assert "no family is named: this is demo" in result.stderr


def test_examples_show_the_fusion_right_where_its_members_are_wrong(demo: FusedLlama) -> None:
    assert len(SPEC.examples) >= 4
    for question in SPEC.examples:
        chat = [{"role": "user", "content": question}]
        said = [
            demo.create_chat_completion(chat, temperature=0, max_tokens=24, method=method)["choices"][0]["message"]
            for method in ("large", "dynamic")
        ]
        assert said[0] != said[1]
        assert said[1]["content"].startswith("The answer is ")
