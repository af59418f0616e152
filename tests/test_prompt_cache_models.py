"""The prompt cache with llama.cpp: tiny models of each kind of memory, whole families, and the commands."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import pytest
from click.testing import CliRunner, Result

from edge_dlf import FusedLlama, InvalidParameterError
from edge_dlf.cli import main
from edge_dlf.engine import ensemble
from edge_dlf.engine.backend import Run
from edge_dlf.llama import LlamaBackend, Model, context
from edge_dlf.system.machine import Machine

from .test_states import STATEFUL
from .tiny import tiny_lora, tiny_model, weighted_family

TEXT = np.random.default_rng(3).integers(33, 250, size=120).tolist()
DOCUMENT = "The cat sat on the mat, and then it went into the garden. " * 10
ASKED: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let shorter texts be worth it, so that tiny models have room for them."""
    monkeypatch.setattr(ensemble.Ensemble.keep, "__defaults__", (40,))
    monkeypatch.setattr(ensemble, "WORTH_READING", 20)
    monkeypatch.setattr(ensemble, "WORTH_KEEPING", 40)


def row(member: LlamaBackend, tokens: Sequence[int], seq: int = 0) -> Any:
    member.decode([Run(seq, tokens, 1)])
    return member.logits()[0].copy()


@pytest.mark.parametrize("arch", ["llama", "gemma3", *STATEFUL])
def test_a_state_is_taken_by_another_context(arch: str, tmp_path: Path) -> None:
    """From the only sequence to one of several, which share cells, and back."""
    model = Model(tiny_model(tmp_path / f"{arch}.gguf", arch=arch))
    one, several = LlamaBackend(model, "a", n_ctx=256), LlamaBackend(model, "b", n_ctx=256, n_seq_max=3)
    expected = row(one, TEXT)
    one.trim(0, 0)
    row(one, TEXT[:100])
    state = one.save(0)
    row(several, TEXT[:7], seq=1)
    assert several.load(2, 100, state)
    assert several.reach(2, 100) == 100
    assert several.reach(2, 80) == (80 if arch == "llama" else 0)
    np.testing.assert_allclose(row(several, TEXT[100:], seq=2), expected, atol=0.03)
    one.trim(0, 0)
    assert one.load(0, 120, several.save(2))
    np.testing.assert_allclose(row(one, [40, 41]), row(several, [40, 41], seq=2), atol=0.03)
    if arch == "llama":
        one.trim(0, 110)
        np.testing.assert_allclose(row(one, TEXT[110:]), expected, atol=0.03)
    for member in (one, several):
        member.close()
    model.close()


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_a_state_of_another_model_is_refused(arch: str, tmp_path: Path) -> None:
    own, other = (
        LlamaBackend(Model(tiny_model(tmp_path / f"{n}.gguf", arch=arch, n_layer=n)), "m", n_ctx=256) for n in (2, 4)
    )
    expected = row(own, TEXT)
    row(other, TEXT)
    own.trim(0, 0)
    assert not own.load(0, len(TEXT), other.save(0))
    np.testing.assert_allclose(row(own, TEXT), expected, atol=1e-4)
    for member in (own, other):
        member.close()
        member.model.close()


@pytest.fixture
def answer(tmp_path: Path) -> Callable[..., Any]:
    """Load a family with the prompt cache in `tmp_path`; return its answer, and the tokens read of the prompt."""

    def answer(family: Any, prompt: Any = DOCUMENT, *, loading: Any = None, **settings: Any) -> tuple[list[int], int]:
        folder = None if settings.pop("plain", False) else tmp_path / "cache"
        how = {"n_ctx": 512, "n_threads": 1, "prompt_cache": folder, **(loading or {})}
        with (
            FusedLlama(family[0], family[1], {"expert": family[2]}, **how)
            if isinstance(family, list)
            else FusedLlama.from_family(family, **how)
        ) as llm:
            stream = llm.stream(prompt, **{**ASKED, **settings})
            return [token.id for token in stream], stream.report.counts.n_prefilled

    return answer


@pytest.fixture(scope="module", params=["gemma3", *STATEFUL])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    drifts = {"large": 0.1, "base": 0.0, "expert": 0.15}
    return [tiny_model(folder / f"{name}.gguf", arch=request.param, drift=drift) for name, drift in drifts.items()]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "seeded"])
def test_answers_are_the_same(tiny: Path, answer: Callable[..., Any], sampling: Any) -> None:
    for more, n_read in (("", None), ("", 1), ("One", 9), ("One two", 9)):
        expected, n_prompt = answer(tiny, DOCUMENT + more, plain=True, **sampling)
        ids, n_prefilled = answer(tiny, DOCUMENT + more, **sampling)
        assert ids == expected
        assert n_prefilled == n_prompt if n_read is None else n_prefilled <= n_read


def test_models_whose_states_cannot_be_cut(family: list[Path], answer: Callable[..., Any]) -> None:
    for more, n_read in (("", None), ("", 16), ("One", 20), ("One two", 22)):
        expected, n_prompt = answer(family, DOCUMENT + more, plain=True)
        ids, n_prefilled = answer(family, DOCUMENT + more)
        assert ids == expected
        assert n_prefilled == n_prompt if n_read is None else n_prefilled <= n_read


def test_what_a_windowed_model_has_left_behind_is_read_again(tmp_path: Path, answer: Callable[..., Any]) -> None:
    """A text that parts from a loaded one within its window must not be gone on with."""
    family = [tiny_model(tmp_path / f"{n}.gguf", arch="gemma3", seed=n) for n in range(3)]
    answer(family)
    how: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "prompt_cache": tmp_path / "cache"}
    with FusedLlama(family[0], family[1], {"expert": family[2]}, **how) as llm:
        ids = llm.tokenize(DOCUMENT)
        loaded = llm.stream(ids, **ASKED)
        list(loaded)
        assert loaded.report.counts.n_prefilled == 16
        other = [*ids[:200], *ids[210:]]
        again = [token.id for token in llm.stream(other, **ASKED)]
    assert again == answer(family, other, plain=True)[0]


@pytest.mark.parametrize("kind", ["weighted", "corrector", "own prompts", "batch"])
def test_families_of_every_kind(
    kind: str, tiny: Path, corrected: Path, tmp_path: Path, answer: Callable[..., Any]
) -> None:
    folder = {"corrector": corrected}.get(kind, tiny)
    if kind == "weighted":
        folder = weighted_family(tiny, tmp_path, "weighted", large=0.5, tuned=0.5)
    settings = {"prompts": {"lora": "Another one. " * 20}} if kind == "own prompts" else {}
    loading = {"n_parallel": 3} if kind == "batch" else {}
    expected, n_prompt = answer(folder, plain=True, loading=loading, **settings)
    assert answer(folder, loading=loading, **settings) == (expected, n_prompt)
    assert answer(folder, loading=loading, **settings) == (expected, 1)
    n_members = {"weighted": 2, "corrector": 2}.get(kind, 4)
    assert len(list((tmp_path / "cache").glob("*.state"))) == n_members


def test_rows_of_a_batch_find_what_an_earlier_batch_has_read(tiny: Path, tmp_path: Path) -> None:
    rows = [f"{DOCUMENT} {n}" for n in ("one", "two", "three")]
    how: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_parallel": 3}
    results = []
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        with FusedLlama.from_family(tiny, prompt_cache=folder, **how) as llm:
            answers = sorted(llm.batch(rows, **ASKED), key=lambda answer: str(answer["custom_id"]))
            results.append([answer["response"]["body"]["choices"][0]["text"] for answer in answers])
            n_evaluated = sum(1 for _ in (tmp_path / "cache").glob("*.state"))
    assert results[0] == results[1] == results[2]
    assert n_evaluated == 4
    with (
        pytest.raises(InvalidParameterError, match="leave out prompt_cache"),
        FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, prompt_cache=tmp_path / "cache") as llm,
    ):
        next(llm.batch(rows, exact=True))


def test_whatever_shapes_a_state_is_part_of_its_key(tiny: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    folder = shutil.copytree(tiny, tmp_path / "family")
    _, n_prompt = answer(folder)
    assert answer(folder)[1] == 1
    assert answer(folder, loading={"n_ctx": 400})[1] == 1
    assert answer(folder, loading={"type_k": "f32"})[1] == n_prompt
    assert answer(folder, loading={"n_parallel": 2})[1] == n_prompt  # flash attention, where one sequence has plain
    toml = folder / "family.toml"
    text = toml.read_text()
    assert 'lora = "lora.gguf"' in text
    toml.write_text(text.replace('lora = "lora.gguf"', 'lora = "lora.gguf"\nscale = 0.5'))
    assert answer(folder)[1] == n_prompt
    toml.write_text(text)
    assert answer(folder)[1] == 1
    tiny_lora(folder / "lora.gguf", seed=9)
    assert answer(folder)[1] == n_prompt
    os.utime(folder / "large.gguf", ns=(1, 1))
    assert answer(folder)[1] == n_prompt


def test_a_text_for_which_there_is_no_memory_is_not_kept(
    tiny: Path, tmp_path: Path, answer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setattr(context, "this_machine", lambda: Machine(1000))
    assert answer(tiny) == answer(tiny, plain=True)
    assert not [*(tmp_path / "cache").glob("*.state")]
    said = {record.getMessage() for record in caplog.records}
    assert "prompts are not kept: base: no memory for a copy of what its KV cache holds" in said


def test_damaged_files_change_no_answer(
    tiny: Path, tmp_path: Path, answer: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    expected, n_prompt = answer(tiny)
    files = sorted((tmp_path / "cache").glob("*.state"))
    good = files[0].read_bytes()
    rng = np.random.default_rng(1)
    for n in range(6):
        damaged = bytearray(good)
        for place in rng.integers(len(good), size=4):
            damaged[place] ^= 1 << rng.integers(8)
        files[0].write_bytes(damaged[: len(good) - n % 2 * 1000])
        caplog.clear()
        assert answer(tiny) == (expected, n_prompt)
        assert [record.getMessage().split(": ")[0] for record in caplog.records] == [str(files[0])]
    assert answer(tiny) == (expected, 1)


class TestCommands:
    @pytest.fixture(autouse=True)
    def data(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(platformdirs, "user_data_dir", lambda *_, **__: str(tmp_path / "data"))

    @staticmethod
    def run(tiny: Path, *arguments: str, stdin: str = "") -> Result:
        how = ["-f", str(tiny), "--threads", "1", "--ctx-size", "512", "--temperature", "0", "--max-tokens", "8"]
        return CliRunner().invoke(main, [*arguments, *how], input=stdin)

    def test_generate(self, tiny: Path, tmp_path: Path) -> None:
        cached = ("generate", DOCUMENT, "--prompt-cache", str(tmp_path / "cache"))
        plain, first, second = self.run(tiny, *cached[:2]), self.run(tiny, *cached), self.run(tiny, *cached)
        assert plain.stdout == first.stdout == second.stdout
        assert plain.exit_code == first.exit_code == second.exit_code == 0
        (path, *_) = (tmp_path / "cache").glob("*.state")
        path.write_bytes(b"not a prompt cache")
        third = self.run(tiny, *cached)
        assert third.stdout == plain.stdout
        (line,) = [line for line in third.stderr.splitlines() if "note:" in line]
        assert line == f"note: {path}: is damaged and is ignored"

    def test_an_impossible_folder_is_one_line(self, tiny: Path) -> None:
        refused = self.run(tiny, "generate", "Hi", "--prompt-cache", str(tiny / "large.gguf"))
        assert refused.exit_code == 2
        (line,) = [line for line in refused.stderr.splitlines() if "prompt_cache" in line]
        assert line.endswith("large.gguf: file exists")

    def test_exact_takes_none(self, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Hi"}))
        arguments = ["batch", str(tmp_path / "rows.jsonl"), "-o", "-", "--exact", "--prompt-cache", str(tmp_path)]
        refused = self.run(tiny, *arguments)
        assert refused.exit_code == 2
        assert "leave out --prompt-cache" in refused.stderr

    def test_a_conversation_goes_on_without_being_read_again(self, tiny: Path, tmp_path: Path) -> None:
        """--continue keeps and takes up the conversation, the cache what was read of it."""
        cache = ("--prompt-cache", str(tmp_path / "cache"))
        self.run(tiny, "chat", "-c", *cache, stdin=f"{DOCUMENT}\n")
        trace = tmp_path / "trace.jsonl"
        self.run(tiny, "chat", "-c", *cache, stdin="Go on\n/stats\n")
        result = self.run(tiny, "chat", "-c", *cache, "--trace", str(trace), stdin="And\n/stats\n")
        (line,) = [line for line in result.stderr.splitlines() if line.startswith("last answer")]
        n_prompt, n_read = int(line.split()[3]), int(line.split()[5])
        assert n_prompt > 200
        assert n_read < 40, line

    def test_save_keeps_what_was_read(self, tiny: Path, tmp_path: Path) -> None:
        file = tmp_path / "saved.json"
        self.run(tiny, "chat", "--prompt-cache", str(tmp_path / "c"), stdin=f"{DOCUMENT[:150]}\n/save {file}\n")
        assert len(list((tmp_path / "c").glob("*.state"))) == 4
