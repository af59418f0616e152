"""Experts over GGUF bases: torch says what llama.cpp says, and what was taught is what the adapter answers."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs the extra train")
pytest.importorskip("tqdm", reason="needs the extra train")

from edge_dlf import FusedLlama  # noqa: E402
from edge_dlf.engine.backend import Run  # noqa: E402
from edge_dlf.llama import LlamaBackend, Model  # noqa: E402
from models.expert.__main__ import main  # noqa: E402
from models.expert.base import read_base  # noqa: E402
from models.expert.examples import Batches, Example, read_examples  # noqa: E402
from models.recipe import train as training  # noqa: E402
from tests.tiny import tiny_lora, tiny_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
TEXT = "The cat sat on the other mat, and in the end it went to the inn."
TAUGHT = {"red": " tomato", "green": " the inn", "blue": " sea"}


def logits_of_llama_cpp(path: Path, loras: tuple[tuple[Path, float], ...] = ()) -> tuple[list[int], np.ndarray]:
    model = Model(path, n_gpu_layers=0)
    tokens = model.tokenize(TEXT.encode(), special=False)
    backend = LlamaBackend(model, "base", n_ctx=128, n_rows=len(tokens), n_threads=1, loras=loras)
    backend.decode([Run(0, tokens, len(tokens))])
    rows = backend.logits().copy()
    backend.close()
    model.close()
    return tokens, rows


def assert_alike(logits: np.ndarray, expected: np.ndarray) -> None:
    logits, expected = (rows - rows.max(-1, keepdims=True) for rows in (logits, expected))
    assert np.abs(logits - expected).max() < 0.05
    assert np.abs(logits - expected).mean() < 0.005


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Colour: {colour}\nWhat:", "answer": answer} for colour, answer in TAUGHT.items()] * 8
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [*map(str, arguments), "--threads", "1"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("arch", "tokenizer"), [("llama", "spm"), ("llama", "bpe"), ("qwen2", "bpe")], ids=lambda value: value
)
def test_torch_computes_what_llama_cpp_does(tmp_path: Path, arch: str, tokenizer: str) -> None:
    path = tiny_model(tmp_path / "base.gguf", arch=arch, tokenizer=tokenizer, n_embd=64, seed=3)
    tokens, expected = logits_of_llama_cpp(path)
    model = read_base(path, 128, torch.float32)
    assert model.shape.n_head_kv == 1
    assert not model.shape.is_tied
    assert model.shape.has_bias == (arch == "qwen2")
    with torch.no_grad():
        assert_alike(model(torch.tensor([tokens]))[0].numpy(), expected)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_an_adapter_adds_in_llama_cpp_what_it_adds_in_torch(tmp_path: Path, arch: str) -> None:
    from models.recipe.export import write_lora

    path = tiny_model(tmp_path / "base.gguf", arch=arch, n_embd=64, seed=3)
    model = read_base(path, 128, torch.float32)
    torch.manual_seed(0)
    model.add_lora(4, 2.5)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    write_lora(tmp_path / "lora.gguf", model, "lora", "a test", licence=None)
    tokens, plain = logits_of_llama_cpp(path)
    _, expected = logits_of_llama_cpp(path, ((tmp_path / "lora.gguf", 1.0),))
    assert np.abs(plain - expected).mean() > 0.3
    with torch.no_grad():
        assert_alike(model(torch.tensor([tokens]))[0].numpy(), expected)


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_an_expert_answers_what_it_was_taught_and_stops(tmp_path: Path, data: Path, arch: str) -> None:
    base, out = tiny_model(tmp_path / "base.gguf", arch=arch, seed=5), tmp_path / "colours.gguf"
    settings = ("--rank", 8, "--alpha", 16, "--lr", 2e-2, "--batch", 200, "--epochs", 40)
    code, said = run(base, data, "-o", out, *settings)
    assert code == 0, said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "colours.gguf", "data.jsonl"]
    with FusedLlama(base, base, {"colours": out}, n_ctx=128, n_threads=1) as llm:
        for colour, answer in TAUGHT.items():
            result = llm.create_completion(
                f"Colour: {colour}\nWhat:", max_tokens=24, temperature=0, repeat_penalty=1.0, method="colours"
            )
            assert result["choices"][0]["text"] == answer
            assert result["choices"][0]["finish_reason"] == "stop"


def test_stopped_it_goes_on_where_it_was(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)
    base = tiny_model(tmp_path / "base.gguf", seed=5)
    settings = ("--batch", 200, "--epochs", 3)
    assert run(base, data, "-o", tmp_path / "whole.gguf", *settings)[0] == 0
    steps, save = [], training._save

    def save_and_stop(*args) -> None:
        save(*args)
        steps.append(args[-1])
        if len(steps) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_and_stop)
    out = tmp_path / "stopped.gguf"
    assert run(base, data, "-o", out, *settings)[0] == 130
    assert not out.exists()
    assert run(base, data, "-o", out, *settings)[0] == 0
    assert steps == list(range(1, len(steps) + 1))
    found, expected = (
        {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
        for path in (out, tmp_path / "whole.gguf")
    )
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_every_example_comes_once_an_epoch_and_answers_alone_are_learnt() -> None:
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(1, 99, 1 + k % 17).tolist(), rng.integers(1, 99, 1 + k % 5).tolist()) for k in range(60)
    ]
    batches = Batches(examples, 40, 2, 7)
    seen: Counter[str] = Counter()
    for step in range(len(batches)):
        tokens, targets = batches[step]
        assert tokens.numel() <= 40
        for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
            learnt = [k for k, token in enumerate(wanted) if token >= 0]
            example = Example(row[: learnt[0] + 1], [wanted[k] for k in learnt])
            assert row[: len(example)] == (example.prompt + example.answer)[:-1]
            seen[repr(example)] += 1
    assert seen == Counter({repr(example): 2 for example in examples})
    assert len(batches) < 60


def test_prompts_are_read_as_edge_dlf_reads_them(tmp_path: Path, data: Path) -> None:
    base = tiny_model(tmp_path / "base.gguf", tokenizer="spm")
    first = read_examples(data, base, 128)[0]
    with FusedLlama(base, base, {"e": tiny_lora(tmp_path / "e.gguf")}, n_ctx=128, n_threads=1) as llm:
        assert first.prompt == llm.tokenize("Colour: red\nWhat:")
        assert llm.detokenize(first.answer[:-1]).strip() == "tomato"
        assert first.answer[-1] == 2


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "has no examples"),
        ("[1]\n", "data.jsonl:1: is not a JSON object"),
        ('\n{"prompt": "a"}\n', "data.jsonl:2: needs 'answer', a string"),
        (json.dumps({"prompt": "word " * 99, "answer": "b"}), "the longest may have 64"),
        (None, "data.jsonl: no such file or directory"),
    ],
)
def test_bad_data_is_told_in_one_line(tmp_path: Path, data: Path, content: str | None, said: str) -> None:
    data.unlink() if content is None else data.write_text(content)
    base = tiny_model(tmp_path / "base.gguf")
    code, told = run(base, data, "-o", tmp_path / "e.gguf", "--max-length", 64)
    assert code in (2, 4)
    assert said in told
    assert told.count("\n") == 1


@pytest.mark.parametrize("kind", ["missing", "no gguf", "qwen3", "adapter"])
def test_a_base_that_cannot_be_used_is_told_in_one_line(tmp_path: Path, data: Path, kind: str) -> None:
    base = tmp_path / "base.gguf"
    if kind == "no gguf":
        base.write_bytes(b"GGUF" + bytes(39))
    elif kind == "qwen3":
        tiny_model(base, arch="qwen3")
    elif kind == "adapter":
        tiny_lora(base)
    code, told = run(base, data, "-o", tmp_path / "e.gguf")
    assert code == 3
    assert told.startswith("models.expert: ")
    assert "base.gguf" in told
    assert told.count("\n") == 1
