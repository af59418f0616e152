"""`edge-dlf bench` on tiny models: everything is measured, and adds up; how fast they are is not asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from edge_dlf.cli import main
from edge_dlf.evidence import bench
from edge_dlf.families.files import check_files
from edge_dlf.families.footprint import footprint
from edge_dlf.families.spec import FamilySpec
from edge_dlf.system.machine import GPU


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EDGE_DLF_FAMILY", raising=False)
    monkeypatch.setenv("EDGE_DLF_CTX_SIZE", "4096")  # holds for other commands
    monkeypatch.setattr(bench, "_ANSWERS_S", 0.1)
    monkeypatch.setattr(bench, "_READ_BYTES", 2**20)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def test_a_family_in_numbers(tiny: Path) -> None:
    result = run(tiny, "--threads", 1, "--json")
    assert result.exit_code == 0, result.output
    speeds = json.loads(result.stdout)
    assert list(speeds["members"]) == ["large", "base", "lora", "tuned"]
    for member in speeds["members"].values():
        assert 0 < member["decode_tps"]["least"] <= member["decode_tps"]["median"] <= member["decode_tps"]["greatest"]
        assert member["prefill_tps"]["median"] > 0
        assert member["read_bytes_s"] == member["token_bytes"] * member["decode_tps"]["median"]
    assert list(speeds["parallel"]) == ["1", "4", "16"]
    assert min(speeds["parallel"].values()) > 0
    assert 0 < speeds["search_share"] < 1
    assert speeds["n_threads"] == 1
    assert speeds["memory_bytes_s"] is None or speeds["memory_bytes_s"] > 0
    assert 0 <= speeds["n_accepted"] <= speeds["n_drafted"]
    ratio = speeds["drafted"]["median"] / speeds["large"]["median"]
    assert f"{ratio:.2f} of the large model alone" in speeds["verdict"]


def test_a_family_in_lines(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "gpus", lambda: [])
    result = run(
        "--large", tiny / "large.gguf", "--base", tiny / "base.gguf", "--expert", f"tuned={tiny / 'tuned.gguf'}"
    )
    assert result.exit_code == 0, result.output
    for label in ("large alone", "base alone", "tuned alone", "fused, plain", "fused, drafted", "fused, 16 at once"):
        assert label in result.stdout
    assert "are read on" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("drafted fusion runs at ")


def test_memory_of_a_gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "gpus", lambda: [GPU("CPU", "a GPU", 10**9, 10**9)])
    result = run(tiny, "--threads", 1)
    assert result.exit_code == 0, result.output
    assert " a second are moved in a copy on a GPU" in result.stdout
    monkeypatch.setattr(bench, "_READ_BYTES", 2**46)
    assert bench.gpu_bytes_s(bench.gpus()[0]) is None


def test_a_family_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    result = run(tmp_path / "missing")
    assert result.exit_code == 3
    assert len(result.stderr.splitlines()) == 1


def test_decoding_a_token_reads_all_weights_but_the_embeddings_of_other_tokens(tiny: Path) -> None:
    files = check_files(FamilySpec.load(tiny))
    for info in (files.models["large"], files.models["base"]):
        size = footprint(info)
        total = sum(tensor.n_bytes for tensor in info.tensors.values())
        assert size.read == (total if size.is_tied else total - info.tensors["token_embd.weight"].n_bytes)
