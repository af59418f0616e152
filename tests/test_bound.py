"""Prompts that are much too long are refused before they are tokenized, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dlf import ContextOverflowError, FusedLlama, InvalidParameterError, SamplingParams
from edge_dlf.answers.fewest_tokens import FewestTokens
from edge_dlf.answers.text import to_bytes
from edge_dlf.llama import Model

from .tiny import tiny_model


@pytest.fixture(scope="module", params=["bpe", "spm"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("bound") / "model.gguf"
    tiny_model(path, seed=1, n_layer=1, tokenizer=request.param)
    return Model(path, vocab_only=True)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text("a b\n") | st.text("\U0001f600é<|>s"))
def test_the_bound_is_no_more_than_the_tokens(model: Model, text: str) -> None:
    names = [model.piece(token, special=True) for token in range(model.n_vocab)]
    bound = FewestTokens([*map(model.piece, range(model.n_vocab)), *names])
    for special in (False, True):
        assert bound.of(to_bytes(text)) <= len(model.tokenize(to_bytes(text), special=special))
    assert bound.of(to_bytes("\U0001f600" * 1000)) >= 250


def test_nothing_is_known_where_a_byte_may_be_left_out() -> None:
    assert FewestTokens([bytes([byte]) for byte in range(255)]).of(b"aaaa") == 0
    assert FewestTokens([*(bytes([byte]) for byte in range(256)), b"aa", b"aaab"]).of(b"aaaa") == 2
    assert FewestTokens([*(bytes([byte]) for byte in range(256)), b"aa", b"aaab"]).of(b"bb") == 2


@pytest.fixture
def llm(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> FusedLlama:
    """A family whose tokenizer fails on more than 100,000 bytes."""

    def tokenize(self: Model, text: bytes, *, special: bool) -> list[int]:
        assert len(text) < 100_000, "it was tokenized"
        return whole(self, text, special=special)

    whole: Callable[..., list[int]] = Model.tokenize
    monkeypatch.setattr(Model, "tokenize", tokenize)
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        yield llm


@pytest.mark.parametrize("char", ["a", " ", "\U0001f600", "<|im_end|>", "\0"])
def test_text_of_megabytes_is_refused_with_the_numbers(llm: FusedLlama, char: str) -> None:
    for ask in (
        lambda: llm.create_completion(char * 1_000_000, max_tokens=2),
        lambda: llm.create_chat_completion([{"role": "user", "content": char * 1_000_000}], max_tokens=2),
        lambda: llm.create_completion("a", prompts={"base": char * 1_000_000}, max_tokens=2),
    ):
        with pytest.raises(
            ContextOverflowError, match=r"the prompt has \d+ tokens or more, more than the context of 256"
        ):
            ask()


def test_a_list_of_more_ids_than_the_context_is_refused(llm: FusedLlama) -> None:
    with pytest.raises(ContextOverflowError, match="the prompt has 1000000 tokens, more than the context of 256"):
        llm.create_completion([1] * 1_000_000, max_tokens=2)


def test_more_biases_than_a_step_can_look_at_are_refused(llm: FusedLlama) -> None:
    biases = dict.fromkeys(map(str, range(2**16)), 1)
    assert len(SamplingParams(logit_bias=biases).logit_bias or ()) == 2**16
    with pytest.raises(InvalidParameterError, match="logit_bias names 65537 tokens, more than 65536"):
        llm.create_completion("a", logit_bias={**biases, "x": 1}, max_tokens=2)


@pytest.mark.parametrize(
    ("stop", "complaint"),
    [
        ([f"{n:x}" for n in range(500_000)], "there are 500000 stop strings, more than 128"),
        (["a" * 1_000_000], "4096 characters"),
        ("a" * 5000, "4096 characters"),
    ],
    ids=["many", "long", "one"],
)
def test_stop_strings_that_would_slow_every_step_are_refused(llm: FusedLlama, stop: object, complaint: str) -> None:
    with pytest.raises(InvalidParameterError, match=complaint):
        llm.create_completion("a", stop=stop, max_tokens=2)
