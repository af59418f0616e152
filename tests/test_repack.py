"""Weights are repacked for the kernels without AMX where AMX is off."""

from __future__ import annotations

from pathlib import Path

import gguf
import llama_cpp as lib
import numpy as np
import pytest

from edge_dlf.engine.backend import Run
from edge_dlf.gguf.info import read_info
from edge_dlf.llama import LlamaBackend, Model, model
from edge_dlf.llama.repack import overrides
from edge_dlf.llama.runtime import initialise
from edge_dlf.system.machine import GPU

from .tiny import tiny_lora, tiny_model

TOKENS = list(range(5, 45))


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "q4_0.gguf", seed=1, dtype=gguf.GGMLQuantizationType.Q4_0)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What llama.cpp says while models are loaded."""
    lines: list[str] = []
    callback = lib.llama_log_callback(lambda _, text, __: lines.append(text.decode()))
    monkeypatch.setattr(initialise(), "_listen", callback)
    return lines


def rows(path: Path, lora: Path, *, repacks: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of the model, and with an adapter over it; of a batch and of a single token."""
    found = []
    loaded = Model(path, weights=read_info(path).tensors if repacks else None)
    for loras in ([], [(lora, 1.0)]):
        member = LlamaBackend(loaded, "member", n_ctx=64, loras=loras)
        member.decode([Run(0, TOKENS, 1)])
        found.append(member.logits()[0].copy())
        member.decode([Run(0, TOKENS[:1], 1)])
        found.append(member.logits()[0].copy())
        member.close()
    loaded.close()
    return np.stack(found[:2]), np.stack(found[2:])


def test_repacked_weights_are_the_same(
    quantized: Path, tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if overrides(read_info(quantized).tensors) is None:
        pytest.skip("this build repacks no weights of Q4_0 on this machine")
    monkeypatch.setattr(model, "amx_crashes", lambda: True)
    lora = tiny_lora(tmp_path / "lora.gguf", seed=3)
    plain, tuned = rows(quantized, lora, repacks=False)
    assert not any("REPACK" in line for line in log)
    plain_too, tuned_too = rows(quantized, lora, repacks=True)
    assert any("CPU_REPACK model buffer size" in line for line in log)
    np.testing.assert_allclose(plain_too, plain, atol=0.2)  # both round what they multiply with
    np.testing.assert_allclose(tuned_too, tuned, atol=0.2)
    assert np.abs(tuned - plain).max() > 1


def test_only_weights_that_can_be_are_named(quantized: Path, tmp_path: Path) -> None:
    found = overrides(read_info(quantized).tensors)
    if found is None:
        pytest.skip("this build repacks no weights of Q4_0 on this machine")
    patterns = [override.pattern for override in found]
    assert patterns.pop() is None
    assert rb"^blk\.(0|1)\.ffn_down\.weight$" in patterns
    assert len(patterns) == 7
    assert len({override.buft for override in found}) == 2
    assert overrides(read_info(tiny_model(tmp_path / "f32.gguf")).tensors) is None


@pytest.mark.parametrize(
    ("crashes", "n_gpus", "n_gpu_layers", "is_asked"),
    [(True, 0, -1, True), (True, 1, 0, True), (True, 1, -1, False), (False, 0, -1, False)],
)
def test_where_they_are_repacked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crashes: bool,
    n_gpus: int,
    n_gpu_layers: int,
    is_asked: bool,
) -> None:
    """Not where AMX works, for then llama.cpp does it; not what may be on a GPU."""
    asked = []
    monkeypatch.setattr(model, "amx_crashes", lambda: crashes)
    monkeypatch.setattr(model, "gpus", lambda: [GPU("CUDA0", "a GPU", 10**10, 10**10)] * n_gpus)
    monkeypatch.setattr(model, "overrides", lambda weights: asked.append(weights))
    path = tiny_model(tmp_path / "f32.gguf")
    Model(path, n_gpu_layers, weights=read_info(path).tensors).close()
    assert bool(asked) == is_asked
