"""What `tests/architectures.py` finds of a few kinds of models: latent attention, experts, hybrid, recurrent."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_dlf.families import members

from .architectures import Draft, decoders, table, tried


@pytest.mark.parametrize("arch", ["deepseek2", "gpt-oss", "plamo2", "rwkv7"])
def test_every_way_of_decoding_does_what_it_should(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("require_runs", "require_adapters_run"):
        monkeypatch.setattr(members, name, lambda *args: None)
    assert tried(arch, tmp_path) == {"plain": True, "drafted": True, "batched": True, "lora": True}


def test_what_llama_cpp_says_is_missing_is_added() -> None:
    draft = Draft("llama")
    assert draft.learn("error loading model: key not found in model: llama.expert_shared_count)")
    assert draft.metadata["expert_shared_count"] == 1
    assert draft.learn("check_tensor_dims: tensor 'blk.0.x.weight' not found)")
    assert draft.learn(
        "tensor 'blk.0.x.weight' has wrong shape; expected    64,    32, got      1,     1,     1,     1)"
    )
    assert draft.shapes["blk.0.x.weight"] == (64, 32)
    assert not draft.learn("error loading model: something else")


def test_the_table_tells_what_was_not_tried() -> None:
    ways = {"plain": True, "drafted": True, "batched": True, "lora": True}
    rows = table([{"architecture": "a", **ways}, {"architecture": "b", **ways, "lora": False}, {"architecture": "c"}])
    assert rows.splitlines()[2:] == [
        "| `a` | yes | yes | yes | yes |",
        "| `b` | yes | yes | yes | no |",
        "",
        "Not tried: `c`.",
    ]
    assert {"llama", "qwen35", "mamba"} < {*decoders()}
