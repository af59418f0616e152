"""Families for the tests: tiny ones made here, and the real one that EDGE_DLF_TEST_FAMILY names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_dlf import FusedLlama

from .tiny import tiny_lora, tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny family: large.gguf (a longer, padded vocabulary), base.gguf, tuned.gguf and lora.gguf."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(folder / "large.gguf", seed=1, n_embd=64, pad_vocab=5)
    tiny_model(folder / "base.gguf", seed=2)
    tiny_model(folder / "tuned.gguf", seed=2, drift=0.5)
    tiny_lora(folder / "lora.gguf", seed=3)
    (folder / "family.toml").write_text(
        'name = "tiny"\n[large]\npath = "large.gguf"\n[base]\npath = "base.gguf"\n'
        '[[experts]]\nname = "lora"\nlora = "lora.gguf"\n[[experts]]\nname = "tuned"\npath = "tuned.gguf"\n'
        "[defaults]\ntemperature = 0.0\n"
    )
    return folder


@pytest.fixture(scope="session")
def tiny_llm(tiny: Path) -> Iterator[FusedLlama]:
    """The tiny family in memory; greedy by its defaults, a context of 256."""
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        yield llm


@pytest.fixture(scope="session")
def real_family() -> str:
    """The family that EDGE_DLF_TEST_FAMILY names; tests that need it are skipped where it is not set."""
    family = os.environ.get("EDGE_DLF_TEST_FAMILY")
    if not family:
        pytest.skip("EDGE_DLF_TEST_FAMILY names no family")
    return family
