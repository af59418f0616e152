"""llama.cpp on a GPU, against itself on the CPU: `EDGE_DLF_TEST_GPU=1 pytest -m gpu`.

The device is any that the installed build of llama.cpp can use, Mesa's software device for Vulkan among them
(docs/gpu.md). Functions are checked, speeds are not.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from click.testing import CliRunner

from edge_dlf import FusedLlama, RequestInterruptedError
from edge_dlf.cli import main
from edge_dlf.engine.backend import Run
from edge_dlf.families import members
from edge_dlf.families.footprint import footprint
from edge_dlf.gguf.info import read_info
from edge_dlf.llama import Interrupt, LlamaBackend, Model, applied_tensors, gpus
from edge_dlf.llama.runtime import initialise

from . import lossless
from .feed import feed
from .tiny import HYBRIDS, tiny_lora, tiny_model

pytestmark = pytest.mark.gpu

TEXT = list(range(40, 90))
ROUNDING = 0.05
"""By how much logits, which spread by 2.5, may differ between a GPU and the CPU, or between batch shapes."""
CPU_ROUNDING = 0.3
"""The same for quantized weights: what they are multiplied by is rounded to 8 bits on the CPU, and not on a GPU."""
MIB = 2**20
PLACES = {
    "whole": -1,
    "part": {"large": 2, "base": 2, "tuned": 1},
    "large on the CPU": {"large": 0},
    "all on the CPU": 0,
}


@pytest.fixture(scope="module", autouse=True)
def device() -> str:
    """The name of the first GPU."""
    if not os.environ.get("EDGE_DLF_TEST_GPU"):
        pytest.skip("EDGE_DLF_TEST_GPU is not set")
    found = gpus()
    assert found, "this build of llama.cpp finds no GPU; GGML_VK_VISIBLE_DEVICES=0 names a software device"
    return found[0].name


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family with a quantized large model of three layers, smaller ones of two, a LoRA and a tuned expert."""
    folder = tmp_path_factory.mktemp("family")
    small: dict[str, Any] = {"n_embd": 64, "seed": 2, "dtype": np.float16}
    tiny_model(folder / "large.gguf", seed=1, n_embd=64, n_layer=3, dtype=gguf.GGMLQuantizationType.Q8_0)
    tiny_model(folder / "base.gguf", **small)
    tiny_model(folder / "tuned.gguf", **small, drift=0.5)
    tiny_lora(folder / "lora.gguf", seed=3, n_embd=64)
    (folder / "family.toml").write_text(
        'name = "tiny"\n[large]\npath = "large.gguf"\n[base]\npath = "base.gguf"\n'
        '[[experts]]\nname = "lora"\nlora = "lora.gguf"\n[[experts]]\nname = "tuned"\npath = "tuned.gguf"\n'
        "[defaults]\ntemperature = 0.0\n"
    )
    return folder


@pytest.fixture(scope="module")
def on_cpu(family: Path) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1, n_gpu_layers=0) as llm:
        yield llm


def rows(path: Path, layers: int, **settings: Any) -> list[np.ndarray]:
    """Rows after a prompt, after single tokens, and of several tokens of one batch."""
    model = Model(path, layers)
    member = LlamaBackend(model, "base", **{"n_ctx": 256, "n_threads": 1, **settings})
    feed(member, 0, TEXT[:12])
    found = [member.logits()[0].copy()]
    for token in TEXT[12:14]:
        member.decode([Run(0, [token], 1)])
        found.append(member.logits()[0].copy())
    member.decode([Run(0, TEXT[14:17], 3)])
    found += [row.copy() for row in member.logits()]
    member.close()
    model.close()
    return found


def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What llama.cpp logs from now on while it loads, line by line."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode())

    monkeypatch.setattr(initialise(), "_listen", keep)
    return lines


def buffers(lines: Sequence[str], kind: str, *, on_gpu: bool) -> float:
    """Bytes of all buffers of a kind that llama.cpp says it allocated, on GPUs or on the host."""
    names = tuple(gpu.name for gpu in gpus())
    found = 0.0
    for line in lines:
        match = re.search(rf"(\S+) +{kind} +buffer size = +([\d.]+) MiB", line)
        if match and on_gpu == (match[1].startswith(names) and not match[1].endswith("_Host")):
            found += float(match[2]) * MIB
    return found


@pytest.mark.parametrize("layers", [-1, 2, 1])
@pytest.mark.parametrize(
    "dtype", [np.float32, np.float16, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0]
)
def test_rows_are_the_cpus(tmp_path: Path, dtype: Any, layers: int) -> None:
    path = tiny_model(tmp_path / "m.gguf", n_embd=64, dtype=dtype)
    atol = CPU_ROUNDING if isinstance(dtype, gguf.GGMLQuantizationType) else ROUNDING
    np.testing.assert_allclose(rows(path, layers), rows(path, 0), atol=atol)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3", "gemma3", "mamba", *HYBRIDS])
def test_rows_of_other_architectures_are_the_cpus(tmp_path: Path, arch: str) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch=arch, n_embd=64)
    for layers in (-1, 2):
        np.testing.assert_allclose(rows(path, layers), rows(path, 0), atol=ROUNDING)


@pytest.mark.parametrize("types", ["f32", "bf16", "q8_0"])
def test_caches_of_other_types(tmp_path: Path, types: str) -> None:
    path = tiny_model(tmp_path / "m.gguf", n_embd=64, head_dim=32)
    found, expected = (rows(path, layers, type_k=types, type_v=types) for layers in (-1, 0))
    np.testing.assert_allclose(found, expected, atol=CPU_ROUNDING if types == "q8_0" else ROUNDING)


@pytest.mark.parametrize("layers", [-1, 2, 1])
def test_a_lora_is_added_on_the_device(family: Path, layers: int) -> None:
    loras = [(family / "lora.gguf", 1.0)]
    model = Model(family / "base.gguf", layers)
    assert applied_tensors(model, family / "lora.gguf") > read_info(family / "lora.gguf").tensors.keys()
    model.close()
    alone, tuned = rows(family / "base.gguf", layers), rows(family / "base.gguf", layers, loras=loras)
    np.testing.assert_allclose(tuned, rows(family / "base.gguf", 0, loras=loras), atol=ROUNDING)
    assert np.abs(np.subtract(alone, tuned)).max() > 0.1


@pytest.mark.parametrize("layers", [-1, 2])
@pytest.mark.parametrize("streams", [False, True])
def test_the_cache_is_cut_shared_and_moved_on_the_device(family: Path, layers: int, streams: bool) -> None:
    path = family / "base.gguf"
    model, host = Model(path, layers), Model(path, 0)
    member = LlamaBackend(model, "base", n_ctx=256, n_seq_max=3, streams=streams, n_threads=1)
    feed(member, 0, TEXT[:12])
    member.copy(0, 1, 9)
    member.trim(0, 6)
    if streams:
        feed(member, 2, TEXT[5:10])
        member.swap(1, 2)
    texts = [TEXT[:6], TEXT[5:10], TEXT[:9]] if streams else [TEXT[:6], TEXT[:9]]
    member.decode([Run(seq, [7, 9], 1) for seq in range(len(texts))])
    for row, text in zip(member.logits(), texts, strict=True):
        alone = LlamaBackend(host, "base", n_ctx=256, n_threads=1)
        feed(alone, 0, [*text, 7, 9])
        np.testing.assert_allclose(row, alone.logits()[0], atol=ROUNDING)
        alone.close()
    member.close()
    model.close()
    host.close()


@pytest.mark.parametrize("arch", ["mamba", "lfm2", "qwen35"])
def test_states_of_recurrent_layers_come_back(tmp_path: Path, arch: str) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch=arch, n_embd=64)
    model, host = Model(path, -1), Model(path, 0)
    member, alone = (LlamaBackend(each, "base", n_ctx=256, n_threads=1) for each in (model, host))
    feed(member, 0, TEXT[:8])
    member.checkpoint(0, lasting=True)
    feed(member, 0, TEXT[8:30])
    assert member.reach(0, 9) == 8
    member.trim(0, 8)
    feed(member, 0, TEXT[8:12])
    feed(alone, 0, TEXT[:12])
    np.testing.assert_allclose(member.logits()[0], alone.logits()[0], atol=ROUNDING)
    for each in (member, alone, model, host):
        each.close()


@pytest.mark.parametrize("layers", [-1, 4, 1, 0])
@pytest.mark.parametrize(("arch", "tied"), [("llama", False), ("llama", True), ("gemma3", False), ("lfm2", False)])
def test_layers_and_caches_lie_where_the_plan_has_them(
    tmp_path: Path, arch: str, tied: bool, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch=arch, n_embd=256, n_layer=6, tied=tied)
    own, lines = footprint(read_info(path)), said(monkeypatch)
    model = Model(path, layers)
    LlamaBackend(model, "base", n_ctx=4096, n_threads=1).close()
    model.close()
    n_gpu = 7 if layers < 0 else layers
    assert any(f"offloaded {n_gpu}/7 layers to GPU" in line for line in lines)
    low = 6 - max(n_gpu - 1, 0)
    weights = sum(own.layers[low:]) + own.output if n_gpu else 0
    assert buffers(lines, "model", on_gpu=True) == pytest.approx(weights, abs=0.02 * MIB)
    assert buffers(lines, "KV", on_gpu=True) == pytest.approx(sum(own.kv[low:]) * 4096, abs=0.02 * MIB)
    assert buffers(lines, "KV", on_gpu=False) == pytest.approx(sum(own.kv[:low]) * 4096, abs=0.02 * MIB)


@pytest.mark.parametrize("n_parallel", [1, 32])
@pytest.mark.parametrize("place", PLACES)
def test_no_more_is_taken_of_the_device_than_planned(
    family: Path, place: str, n_parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines, asked = said(monkeypatch), {"n_gpu_layers": PLACES[place], "n_parallel": n_parallel}
    with FusedLlama.from_family(family, n_ctx=512, n_threads=1, overlap="off", **asked) as llm:
        plan, groups = llm._members.plan, llm._ensemble.groups
    layers = {member.name: (member.n_gpu_layers, member.n_layers) for member in plan.members}
    loaded = [tuple(map(int, found)) for found in re.findall(r"offloaded (\d+)/(\d+) layers", "".join(lines))]
    assert loaded == [layers["large"], layers["base"], layers["tuned"]]
    whole = {(name,) for name, (n_gpu, n_layers) in layers.items() if n_gpu == n_layers}
    assert whole == {group for group in groups if set(group) <= plan.on_gpu}
    taken = sum(buffers(lines, kind, on_gpu=True) for kind in ("model", "KV", "LoRA", "compute"))
    assert 0 < taken <= sum(plan.each_gpu_bytes)


def test_a_full_device_is_left_alone(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where not even what a model on the host would compute there has room, nothing is asked of it."""
    full = [replace(gpu, free_bytes=0) for gpu in gpus()]
    monkeypatch.setattr(members, "gpus", lambda: full)
    lines = said(monkeypatch)
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1) as llm:
        assert not llm._members.plan.on_gpu
        assert llm.create_completion("Once", max_tokens=2)["choices"]
    assert [buffers(lines, kind, on_gpu=True) for kind in ("model", "KV", "LoRA", "compute")] == [0] * 4


@pytest.mark.parametrize(("place", "overlap"), [("whole", "off"), ("whole", "queue"), ("part", "queue")])
def test_answers_are_the_cpus(family: Path, on_cpu: FusedLlama, place: str, overlap: Any) -> None:
    """With and without drafts, greedy and sampled: the same tokens, or a tie that rounding turned."""
    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_gpu_layers": PLACES[place], "overlap": overlap}
    n_tokens = 0
    with (
        FusedLlama.from_family(family, **settings) as llm,
        lossless.Recorder(llm) as found,
        lossless.Recorder(on_cpu) as expected,
    ):
        for name, drafts in (("greedy", ("off", "auto", 3)), ("sampled", (3,))):
            sampling = lossless.SAMPLINGS[name]
            n_prompt = expected.answer("Once upon", 8, "off", sampling).n_prompt
            for draft in drafts:
                report = found.answer("Once upon", 8, draft, sampling)
                assert draft == "auto" or (report.counts.n_drafted > 0) == (draft == 3)
                parting = lossless.parting(expected, found, sampling.seed or 0, n_prompt)
                assert parting is None or (parting.is_tie and parting.rounding < CPU_ROUNDING), parting
                n_tokens += parting.token if parting else report.n_generated
    assert n_tokens > 16  # of 32: ties are rare


def test_rows_of_a_batch_are_single_answers(family: Path, on_cpu: FusedLlama) -> None:
    prompts = [f"Row {n}: once" for n in range(4)]
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1, n_parallel=3) as llm:
        done = llm.batch([{"id": n, "prompt": prompt, "max_tokens": 4} for n, prompt in enumerate(prompts)], raw=True)
        texts = {each["custom_id"]: each["response"]["body"]["choices"][0]["text"] for each in done}
    alone = [on_cpu.create_completion(prompt, max_tokens=4)["choices"][0]["text"] for prompt in prompts]
    assert sum(texts[str(n)] == text for n, text in enumerate(alone)) >= 3, (texts, alone)  # one may be a tie


def test_scores_are_the_cpus(family: Path, on_cpu: FusedLlama) -> None:
    answer = on_cpu.tokenize(" there was a GPU")
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1, overlap="off") as llm:
        scores = [next(each.score([("Once upon a time", answer)], method="static"))[1] for each in (llm, on_cpu)]
    np.testing.assert_allclose(*(score.logprobs for score in scores), atol=CPU_ROUNDING)


def test_a_member_that_is_loaded_later_goes_to_the_device(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = said(monkeypatch)
    toml = (family / "family.toml").read_text()
    own = family.parent / "later"
    own.mkdir(exist_ok=True)
    for key in ("path", "lora"):
        toml = toml.replace(f'{key} = "', f'{key} = "{family}/')
    (own / "family.toml").write_text(toml + 'method = "large"\n')
    with FusedLlama.from_family(own, n_ctx=256, n_threads=1, overlap="off") as llm:
        assert "".join(lines).count("offloaded") == 1
        assert llm.create_completion("Once", max_tokens=3, method="tuned")["choices"]
        assert re.findall(r"offloaded (\d/\d) layers", "".join(lines)) == ["4/4", "3/3"]


def test_an_interrupt_stops_before_the_next_batch(family: Path) -> None:
    interrupt, model = Interrupt(), Model(family / "base.gguf", -1)
    member = LlamaBackend(model, "base", n_ctx=256, n_threads=1, interrupt=interrupt)
    feed(member, 0, TEXT[:10])
    interrupt.set()
    with pytest.raises(RequestInterruptedError, match="interrupted"):
        feed(member, 0, TEXT[10:20])
    interrupt.clear()
    member.trim(0, 10)
    feed(member, 0, TEXT[10:20])
    host = Model(family / "base.gguf", 0)
    alone = LlamaBackend(host, "base", n_ctx=256, n_threads=1)
    feed(alone, 0, TEXT[:20])
    np.testing.assert_allclose(member.logits()[0], alone.logits()[0], atol=ROUNDING)
    for each in (member, alone, model, host):
        each.close()


def test_a_plan_that_the_device_cannot_hold(family: Path) -> None:
    arguments = ["-f", str(family), "--ctx-size", "2000000000", "--threads", "1", "Hi"]
    result = CliRunner().invoke(main, ["generate", "--gpu-layers", "99", *arguments])
    assert result.exit_code == 4
    assert re.search(r"need \S+ GB on the GPU with these layers, \S+ [MG]B are free there", result.stderr)


@pytest.mark.parametrize(
    ("large", "n_bytes", "n_ctx", "words"),
    [
        ("deep", MIB, 256, "deep.gguf: not enough memory for its weights"),
        ("large", MIB, 65536, "large: no memory for a context of 65536"),
        ("large", MIB // 16, 256, "large: no memory for a context of 256"),  # for what it computes
    ],
)
def test_a_device_that_is_full(family: Path, device: str, large: str, n_bytes: int, n_ctx: int, words: str) -> None:
    """What was free when the plan was made is not there any more: no buffer may be larger than `n_bytes`."""
    if not device.startswith("Vulkan"):
        pytest.skip("only Vulkan's memory can be limited")
    if large == "deep":
        tiny_model(family / "deep.gguf", n_embd=64, n_layer=12)
    files = [f"--large={family}/{large}.gguf", f"--base={family}/base.gguf", f"--expert=tuned={family}/tuned.gguf"]
    command = [sys.executable, "-m", "edge_dlf", "generate", *files, "--ctx-size", str(n_ctx), "--threads", "1", "Hi"]
    env = {**os.environ, "GGML_VK_FORCE_MAX_BUFFER_SIZE": str(n_bytes)}
    done = subprocess.run(command, capture_output=True, env=env, text=True)
    assert done.returncode == 4, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_doctor_says_what_goes_where(family: Path) -> None:
    options = ["--gpu-layers", "large=2,base=0", "--ctx-size", "256", "--json"]
    result = CliRunner().invoke(main, ["doctor", str(family), *options])
    found, gpu = {check["name"]: check for check in json.loads(result.stdout)["checks"]}, gpus()[0]
    assert re.search(rf"{re.escape(gpu.description)}, \S+ [MG]B of \S+ [MG]B free", found["GPU"]["text"])
    for words in ("(2/4 layers on ", "(0/3 layers on ", "(3/3 layers on "):
        assert words in found["fits"]["text"]
    assert all(found[f"decode {name}"]["verdict"] == "ok" for name in ("large", "base", "lora", "tuned")), found


@pytest.mark.parametrize(
    "options", [(), ("--main-gpu", "0"), ("--tensor-split", "1"), ("--gpu-layers", "2"), ("--overlap", "queue")]
)
def test_options_of_the_command_line(family: Path, on_cpu: FusedLlama, options: tuple[str, ...]) -> None:
    shared = ["-f", str(family), "--raw", "--ctx-size", "256", "--threads", "1", "--max-tokens", "3"]
    result = CliRunner().invoke(main, ["generate", *shared, *options, "Once upon"])
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == on_cpu.create_completion("Once upon", max_tokens=3)["choices"][0]["text"].strip()
    assert not result.stderr
