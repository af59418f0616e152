"""`benchmarks/gpu.py` with tiny shapes: the files it makes, and that every line of its table can be measured."""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Quantization
from gguf.quants import dequantize

from benchmarks import gpu, shapes
from edge_dlf import FusedLlama
from edge_dlf.engine.backend import Run
from edge_dlf.gguf.info import read_info
from edge_dlf.llama import LlamaBackend, Model

TINY = {
    "tiny-llama": shapes.Shape("llama", 1000, 3, 256, 512, 4, 2),
    "tiny-qwen": shapes.Shape("qwen2", 1128, 2, 256, 512, 4, 2, n_padding=128),
    "deep-qwen": shapes.Shape("qwen2", 1000, 24, 128, 256, 2, 1, is_tied=True),
    "tiny-qwen-0": shapes.Shape("qwen2", 1000, 2, 128, 256, 2, 1, is_tied=True),
}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "SHAPES", {**shapes.SHAPES, **TINY})


@pytest.mark.parametrize("kind", list(shapes._BLOCKS))
def test_blocks_have_the_mean_and_the_deviation_that_is_asked_for(kind: Quantization) -> None:
    raw = shapes._weights("blk.0.ffn_up.weight", (128, 1024), kind, (0, 1))
    values = dequantize(raw, kind)
    assert values.shape == (128, 1024)
    assert values.std() == pytest.approx(1 / math.sqrt(1024), rel=0.02)
    assert abs(values.mean()) < 0.01 * values.std()


@pytest.mark.parametrize("name", list(TINY))
def test_logits_of_a_file_are_sane_and_the_file_is_always_the_same(name: str, tmp_path: Path) -> None:
    path = shapes.model(tmp_path, name, 0)
    info = read_info(path)
    assert info.n_vocab == TINY[name].n_vocab
    model = Model(path)
    member = LlamaBackend(model, name, n_ctx=256, n_threads=1)
    member.decode([Run(0, list(range(100, 140)), 4)])
    rows = member.logits().copy()
    member.close()
    model.close()
    assert np.isfinite(rows).all()
    assert 0.8 * shapes.SPREAD < rows.std(axis=1).min() <= rows.std(axis=1).max() < 1.2 * shapes.SPREAD
    assert np.corrcoef(rows)[0, 1] < 0.9
    assert path.read_bytes() == shapes.model(tmp_path / "again", name, 0).read_bytes()


def test_a_tuned_model_differs_in_its_last_layer_alone(tmp_path: Path) -> None:
    base, tuned = (gguf.GGUFReader(shapes.model(tmp_path, "tiny-qwen-0", 1, seed)) for seed in (None, 2))
    differing = [a.name for a, b in zip(base.tensors, tuned.tensors, strict=True) if not np.array_equal(a.data, b.data)]
    assert differing == ["blk.1.ffn_down.weight"]


def n_bytes(name: str) -> int:
    return sum(
        int(np.prod(rows)) // gguf.GGML_QUANT_SIZES[kind][0] * gguf.GGML_QUANT_SIZES[kind][1]
        for _, (rows, kind) in shapes._tensors(shapes.SHAPES[name])
    )


@pytest.mark.parametrize(
    ("name", "n_gigabytes"),
    [("llama2-13b", 7.87), ("llama2-7b", 4.08), ("llama-1.1b", 0.668), ("qwen2.5-7b", 4.68), ("qwen2.5-0.5b", 0.485)],
)
def test_real_shapes_have_the_size_of_real_files(name: str, n_gigabytes: float) -> None:
    assert n_bytes(name) / 1e9 == pytest.approx(n_gigabytes, rel=0.02)


def test_types_are_those_of_a_real_file() -> None:
    """As in Qwen2.5-Coder 0.5B, whose rows of 896 do not fit the K types."""
    kinds = Counter(
        (name.split(".", 2)[-1], kind.name) for name, (rows, kind) in shapes._tensors(shapes.SHAPES["qwen2.5-0.5b"])
        if len(rows) > 1
    )  # fmt: skip
    assert kinds["ffn_down.weight", "Q6_K"] == kinds["ffn_down.weight", "Q4_K"] == 12
    assert kinds["attn_v.weight", "Q8_0"] == kinds["attn_v.weight", "Q5_0"] == 12
    assert kinds["ffn_up.weight", "Q5_0"] == kinds["attn_q.weight", "Q5_0"] == 24


def test_the_whole_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FAMILIES", {"a": ("tiny-llama", "tiny-llama"), "b": ("tiny-qwen", "tiny-qwen-0")})
    monkeypatch.setattr(gpu.bench, "_READ_BYTES", 2**20)
    monkeypatch.setattr(gpu, "gpus", lambda: [])
    monkeypatch.setattr(gpu, "default_n_threads", lambda: 1)
    gpu.main([str(tmp_path), "--families", "a,b", "--steps", "3", "--batches", "1,3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no GPU: this is the CPU"
    assert lines[2] == "| | a | b |"
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:4]] for cells in (line.split("|") for line in lines[4:])
    }
    expected = [
        "large alone, tokens/s",
        "base alone",
        "expert alone",
        "fused, plain",
        "fused, 3 at once",
        "step of 1: members, ms",
    ]
    expected += ["step of 3: search and choice, ms", "step of 3: Python, ms", "copying", "read a second"]
    expected += [f"accepted as in {name}" for name in gpu.accepted()]
    for label in expected:
        cells = next(cells for name, cells in rows.items() if label in name)
        assert len(cells) == 2
        for cell in cells:
            first = re.match(r"[\d.]+", cell)
            assert first
            assert float(first[0]) >= 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gguf"] * 6


def test_unknown_families_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([str(tmp_path), "--families", "70b"])
    assert "there is no family '70b'" in capsys.readouterr().err


def test_guesses_are_right_where_the_record_says_so(tiny: Path) -> None:
    record = "1101" * 40
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        run = gpu.Bench(llm, 1)
        gpu.Replay(run.decoder.fuser, record)
        generation = run.begin(n_draft=4)
        assert len(generation.tokens) == gpu.N_PROMPT + 1
        for _ in range(12):
            start = len(generation.tokens)
            (result,) = run.decoder.step([generation])
            right = [pick.from_draft for pick in result.picks]
            n_right = record[start : start + 4].find("0") if "0" in record[start : start + 4] else 4
            assert right == [True] * n_right + [False]
