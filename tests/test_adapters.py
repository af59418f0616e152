"""LoRA adapters on which llama.cpp aborts, or of which it leaves a part out without a word: each is refused by name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from edge_dlf import FamilyError, FusedLlama, ModelFileError
from edge_dlf.cli import main
from edge_dlf.families import guard
from edge_dlf.families.files import check_files
from edge_dlf.families.spec import FamilySpec
from edge_dlf.gguf.info import read_info
from edge_dlf.llama import Model, adapters, applied_tensors

from .tiny import tiny_lora, tiny_model

RANK, N_EMBD, N_VOCAB = 4, 32, 306
Pair = tuple[tuple[int, int], tuple[int, int]]
QUERY: Pair = (RANK, N_EMBD), (N_EMBD, RANK)
EMBEDDING: Pair = (N_VOCAB, RANK), (N_EMBD, RANK)
"""Shapes of A and B, rows first."""


@pytest.fixture(autouse=True)
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    return tmp_path / "cache" / "trials.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "large.gguf", seed=1)
    tiny_model(folder / "base.gguf", seed=2)
    tiny_model(folder / "tied.gguf", seed=2, tied=True)
    tiny_model(folder / "mamba.gguf", seed=2, arch="mamba")
    return folder


def adapter(
    path: Path, pairs: dict[str, Pair], keys: Callable[[gguf.GGUFWriter], object] = lambda _: None, **settings: Any
) -> Path:
    """Write an adapter with these pairs. arch, alpha, fill, quantization: what else is unlike others."""
    writer = gguf.GGUFWriter(path, settings.get("arch", "llama"))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if "alpha" not in settings:
        writer.add_float32("adapter.lora.alpha", 8.0)
    keys(writer)
    rng = np.random.default_rng(0)
    for name, shapes in pairs.items():
        for half, shape in zip("ab", shapes, strict=True):
            values = settings.get("fill", 0.1) * rng.standard_normal(shape, np.float32)
            kind = settings.get("quantization")
            if kind is None or shape[-1] % 32:
                writer.add_tensor(f"{name}.lora_{half}", values)
            else:
                writer.add_tensor(f"{name}.lora_{half}", gguf.quantize(values, kind), raw_dtype=kind)
    for name in settings.get("norms", ()):
        writer.add_tensor(name, np.ones(N_EMBD, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(folder: Path, lora: object, base: str = "base.gguf") -> ModelFileError:
    """Why the family is refused; one line that names the adapter."""
    with pytest.raises(ModelFileError) as caught:
        FusedLlama(folder / "large.gguf", folder / base, {"x": lora}, n_ctx=64)  # type: ignore[dict-item]
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"keys": lambda w: w.add_array("adapter.alora.invocation_tokens", [1, 2])},
            "in effect after certain tokens only (adapter.alora.invocation_tokens)",
        ),
        ({"norms": ["blk.0.attn_norm.weight"]}, "the trained norm 'blk.0.attn_norm.weight', which llama.cpp ignores"),
        ({"norms": ["output_norm.weight"]}, "the trained norm 'output_norm.weight', which llama.cpp ignores"),
        ({"norms": ["blk.0.attn_q.bias"]}, "the tensor 'blk.0.attn_q.bias', which is not half of a pair"),
        ({"arch": "qwen2"}, "is a LoRA over 'qwen2'"),
    ],
)  # fmt: skip
def test_what_an_adapters_header_tells(folder: Path, tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    lora = adapter(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": QUERY}, **settings)
    error = refusal(folder, lora)
    assert expected in error.reason
    assert str(lora) in str(error)


@pytest.mark.parametrize("kind", [None, "model", "lora"])
def test_an_adapter_that_is_not_marked_as_one(folder: Path, tmp_path: Path, kind: str | None) -> None:
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    if kind:
        writer.add_type(kind)
    for half, shape in zip("ab", QUERY, strict=True):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{half}", np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    error = refusal(folder, tmp_path / "lora.gguf")
    assert error.reason == f"is a LoRA adapter whose general.type is '{kind}', not 'adapter'"
    assert "convert_lora_to_gguf.py" in error.advice


@pytest.mark.parametrize(("write", "value"), [("float64", 8.0), ("uint32", 8), ("string", "8"), ("array", [8.0])])
def test_alpha_of_another_type(folder: Path, tmp_path: Path, write: str, value: object) -> None:
    def keys(writer: gguf.GGUFWriter) -> None:
        getattr(writer, f"add_{write}")("adapter.lora.alpha", value)

    lora = adapter(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": QUERY}, keys, alpha=None)
    assert re.search(r"value of 'adapter.lora.alpha' has the type \d+, not 6", refusal(folder, lora).reason)


def test_an_adapter_over_tied_embeddings(folder: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora.gguf", {"token_embd.weight": EMBEDDING})
    assert (
        "over 'token_embd.weight', which tied.gguf also has as its output" in refusal(folder, lora, "tied.gguf").reason
    )
    with FusedLlama(folder / "large.gguf", folder / "base.gguf", {"x": lora}, n_ctx=64) as llm:
        assert llm.create_completion("hello", max_tokens=3)["choices"]


def test_an_adapter_in_several_files(folder: Path, tmp_path: Path) -> None:
    for number, layer in enumerate((0, 1)):
        name = f"blk.{layer}.attn_q.weight"
        adapter(tmp_path / f"l-0000{number + 1}-of-00002.gguf", {name: QUERY}, keys=lambda w, n=number: (
            w.add_uint16("split.no", n), w.add_uint16("split.count", 2), w.add_int32("split.tensors.count", 4),
        ))  # fmt: skip
    assert (
        "in 2 files, of which llama.cpp reads only the first"
        in refusal(folder, tmp_path / "l-00001-of-00002.gguf").reason
    )


@pytest.mark.parametrize("second", ["lora.gguf", "here/../lora.gguf", "link.gguf"])
def test_an_adapter_named_twice(folder: Path, tmp_path: Path, second: str) -> None:
    lora = tiny_lora(tmp_path / "lora.gguf")
    (tmp_path / "here").mkdir()
    (tmp_path / "link.gguf").symlink_to(lora)
    spec = FamilySpec.from_files(
        folder / "large.gguf", folder / "base.gguf", {"x": [(lora, 0.5), (tmp_path / second, 0.25)]}
    )
    with pytest.raises(FamilyError, match=r"expert 'x' names .*lora.gguf twice; name it once, with the sum"):
        check_files(spec)


@pytest.mark.parametrize("fill", [np.nan, np.inf])
def test_values_that_are_no_numbers(folder: Path, tmp_path: Path, fill: float) -> None:
    lora = adapter(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": QUERY}, fill=fill)
    assert "its logits are not numbers" in refusal(folder, lora).reason


def test_a_pair_that_llama_cpp_leaves_out(folder: Path, tmp_path: Path) -> None:
    pairs = {"blk.0.ssm_in.weight": ((RANK, 32), (128, RANK)), "blk.0.ssm_conv1d.weight": ((RANK, 4), (64, RANK))}
    lora = adapter(tmp_path / "lora.gguf", pairs, arch="mamba")
    error = refusal(folder, lora, "mamba.gguf")
    assert "lora.gguf: llama.cpp does not apply blk.0.ssm_conv1d.weight.lora_a" in error.reason


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0])
def test_a_quantized_adapter_works(folder: Path, tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    lora = adapter(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": QUERY}, quantization=kind)
    with FusedLlama(folder / "large.gguf", folder / "base.gguf", {"x": lora}, n_ctx=64) as llm:
        assert llm.create_completion("hello", max_tokens=3, method="x")["choices"]


def test_the_tensors_that_take_part(folder: Path, tmp_path: Path) -> None:
    model, lora = Model(folder / "base.gguf"), tiny_lora(tmp_path / "lora.gguf")
    assert read_info(lora).tensors.keys() <= applied_tensors(model, lora)
    model.close()


def test_parts_that_are_copied_to_another_device_are_applied(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    lora, call = adapter(tmp_path / "lora.gguf", {"blk.0.attn_q.weight": QUERY}), adapters.call
    monkeypatch.setattr(adapters, "call", lambda *given: b"CUDA0#%s#0" % call(*given))
    model = Model(folder / "base.gguf")
    assert read_info(lora).tensors.keys() <= applied_tensors(model, lora)
    model.close()


class TestATrial:
    """Adapters are tried in another process, once."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
        """The adapters of every trial."""
        asked: list[list[str]] = []
        run = guard._run

        def counted(question: dict[str, Any], patience_s: float) -> guard.Trial:
            asked.append([Path(path).stem for path, _ in question["loras"]])
            return run(question, patience_s)

        monkeypatch.setattr(guard, "_run", counted)
        return asked

    @staticmethod
    def load(folder: Path, *loras: Path) -> None:
        experts = {lora.stem: lora for lora in loras}
        FusedLlama(folder / "large.gguf", folder / "base.gguf", experts, n_ctx=64).close()

    def test_all_new_ones_at_once_and_never_again(self, folder: Path, tmp_path: Path, asked: list[list[str]]) -> None:
        a, b = tiny_lora(tmp_path / "a.gguf"), tiny_lora(tmp_path / "b.gguf", seed=9)
        for _ in range(2):
            self.load(folder, a, b)
        assert asked == [["a", "b"]]
        tiny_lora(tmp_path / "b.gguf", seed=5)
        self.load(folder, a, b)
        assert asked == [["a", "b"], ["b"]]

    def test_the_one_that_fails_is_named(self, folder: Path, tmp_path: Path, asked: list[list[str]]) -> None:
        good = tiny_lora(tmp_path / "good.gguf")
        bad = adapter(tmp_path / "bad.gguf", {"blk.0.attn_q.weight": QUERY}, fill=np.nan)
        for _ in range(2):
            with pytest.raises(ModelFileError, match=r"bad\.gguf: cannot be used over base\.gguf"):
                self.load(folder, good, bad)
        assert asked == [["good", "bad"], ["good"], ["bad"]]

    def test_a_trial_holds_for_its_scale(self, folder: Path, tmp_path: Path) -> None:
        lora = tiny_lora(tmp_path / "a.gguf")
        for scale in (1e37, 0.0, 1e37, 1.0):
            experts = {"a": [(lora, scale)]}
            if scale > 1:
                with pytest.raises(ModelFileError, match="its logits are not numbers"):
                    FusedLlama(folder / "large.gguf", folder / "base.gguf", experts, n_ctx=64)
            else:
                FusedLlama(folder / "large.gguf", folder / "base.gguf", experts, n_ctx=64).close()

    def test_a_trial_that_cannot_run_stops_nothing(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(guard, "_run", lambda *_: guard.Trial(False, "its process was killed", is_final=False))
        self.load(folder, tiny_lora(tmp_path / "a.gguf"))


def test_doctors_advice_leads_to_an_expert_that_works(folder: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora.gguf", {"token_embd.weight": EMBEDDING})
    arguments = ["--large", str(folder / "large.gguf"), "--base", str(folder / "tied.gguf"), "--expert", f"x={lora}"]
    result = CliRunner().invoke(main, ["doctor", *arguments, "--json"])
    (problem,) = [check for check in json.loads(result.stdout)["checks"] if check["verdict"] == "problem"]
    assert problem["next_step"].startswith("merge the adapter into its base")
    whole = tiny_model(tmp_path / "merged.gguf", seed=2, tied=True, drift=0.1)
    arguments[-1] = f"x={whole}"
    assert CliRunner().invoke(main, ["doctor", *arguments]).exit_code == 0


def test_no_adapter_kills_the_command(folder: Path, tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora.gguf", {"token_embd.weight": EMBEDDING})
    files = ["--large", str(folder / "large.gguf"), "--base", str(folder / "tied.gguf"), "--expert", f"x={lora}"]
    command = [sys.executable, "-m", "edge_dlf", "generate", "--raw", "--max-tokens", "3", "hello", *files]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "'token_embd.weight'" in done.stderr
