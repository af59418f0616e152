"""Tries each architecture that llama.cpp knows by a family of tiny random models: plain, drafted, batched, with a LoRA.

    python -m tests.architectures [NAME ...] --out RESULTS.jsonl [--seconds 170]
    python -m tests.architectures --out RESULTS.jsonl --table

What a model of an architecture has to hold is found by asking llama.cpp: it names the key or tensor that is missing, or
the shape that it expects, until it loads the file. Where it ends the process, the next architecture gets another one.
Each is a line of RESULTS; the same command again goes on behind the last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from edge_dlf import EdgeDLFError, FusedLlama
from edge_dlf.families import members
from edge_dlf.llama import Model, applied_tensors

from .tiny import add_tokenizer, bpe_vocabulary

Value = int | float | bool | str | list[int] | list[bool] | list[float]

N_EMBD, N_LAYER, N_HEAD, WIDTH = 64, 2, 4, 16
CORE: dict[str, Value] = {
    "context_length": 256,
    "embedding_length": N_EMBD,
    "block_count": N_LAYER,
    "feed_forward_length": 128,
    "attention.head_count": N_HEAD,
    "attention.head_count_kv": 2,
    "attention.key_length": WIDTH,
    "attention.value_length": WIDTH,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.dimension_count": WIDTH,
}
"""Keys that every model here has."""
ASKED: dict[str, Value] = {
    "attention.sliding_window": 64,
    "attention.sliding_window_pattern": [True, False],
    "attention.max_alibi_bias": 8.0,
    "attention.clamp_kqv": 4.0,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "attention.group_norm_epsilon": 1e-5,
    "attention.group_norm_groups": 1,
    "attention.shared_kv_layers": 0,
    "attention.key_length_swa": WIDTH,
    "attention.value_length_swa": WIDTH,
    "attention.indexer.head_count": 2,
    "attention.indexer.key_length": WIDTH,
    "attention.indexer.top_k": 512,
    "attention.output_scale": 1.0,
    "attention.temperature_length": 256,
    "attention.temperature_scale": 0.1,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "expert_count": 4,
    "expert_used_count": 2,
    "expert_feed_forward_length": 32,
    "expert_chunk_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
    "expert_shared_count": 1,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_group_scale": 1.0,
    "experts_per_group": 2,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": True,
    "expert_gating_func": 2,
    "leading_dense_block_count": 1,
    "interleave_moe_layer_step": 1,
    "moe_every_n_layers": 2,
    "moe_latent_size": 32,
    "full_attention_interval": 2,
    "ssm.conv_kernel": 4,
    "ssm.inner_size": 128,
    "ssm.state_size": 16,
    "ssm.time_step_rank": 8,
    "ssm.group_count": 1,
    "shortconv.l_cache": 3,
    "kda.head_dim": WIDTH,
    "wkv.head_size": 64,
    "time_mix_extra_dim": 16,
    "time_decay_extra_dim": 16,
    "attention.decay_lora_rank": 16,
    "attention.iclr_lora_rank": 16,
    "attention.value_residual_mix_lora_rank": 16,
    "attention.gate_lora_rank": 16,
    "token_shift_count": 2,
    "rescale_every_n_layers": 0,
    "use_parallel_residual": True,
    "rope.dimension_sections": [2, 2, 2, 2],
    "rope.freq_base": 10000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
    "rope.scaling.original_context_length": 256,
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "embedding_length_per_layer_input": 16,
    "altup.num_inputs": 4,
    "altup.active_idx": 0,
    "activation_sparsity_scale": [1.0, 1.0],
    "xielu.alpha_n": [0.8, 0.8],
    "xielu.alpha_p": [0.8, 0.8],
    "xielu.beta": [0.5, 0.5],
    "xielu.eps": [-1e-6, -1e-6],
    "vocab_size": 306,
    "kda.gate_lower_bound": -5.0,
    "swiglu_clamp_exp": [7.0, 7.0],
    "attention.indexer.kpool": 4,
    "attention.causal": True,
    "norm_before_residual": True,
}
"""Keys that a model gets where llama.cpp asks for them."""
MIXED: dict[str, Value] = {"attention.head_count_kv": [0, 2]}
EXPERTS: dict[str, Value] = {
    name: ASKED[name] for name in ("expert_count", "expert_used_count", "expert_feed_forward_length")
}
MLA: dict[str, Value] = {
    "rope.dimension_count": 8,
    "attention.q_lora_rank": 32,
    "attention.kv_lora_rank": 32,
    "attention.key_length_mla": 24,
    "attention.value_length_mla": 16,
    "attention.head_count_kv": 1,
    "attention.key_length": 40,
    "attention.value_length": 32,
}
OWN: Mapping[str, Mapping[str, Value]] = {
    "mamba": {"feed_forward_length": 0, "attention.head_count": 0, "attention.head_count_kv": 0},
    "mamba2": {"feed_forward_length": 0, "attention.head_count": 0, "attention.head_count_kv": 0},
    "jamba": MIXED,
    "lfm2": MIXED,
    "lfm2moe": MIXED,
    "granitehybrid": MIXED,
    "plamo2": {**MIXED, "ssm.group_count": 0},
    "nemotron_h": {**MIXED, "block_count": 3, "attention.head_count_kv": [0, 2, 0], "feed_forward_length": [0, 0, 128]},
    "nemotron_h_moe": {
        **{"block_count": 3, "attention.head_count_kv": [0, 2, 0], "feed_forward_length": [0, 0, 128]},
        **{"expert_shared_feed_forward_length": 32, "expert_shared_count": 1},
    },
    "rwkv7": {"attention.gate_lora_rank": 16},
    "arwkv7": {"token_shift_count": 1, "attention.gate_lora_rank": 16},
    "rwkv6qwen2": {"token_shift_count": 1, "attention.head_count": 1, "attention.head_count_kv": 1},
    "rwkv6": {"attention.head_count": 1, "attention.head_count_kv": 1},
    **{name: {"full_attention_interval": 2} for name in ("qwen35", "qwen35moe", "qwen3next")},
    **{name: {**MLA, "attention.head_count_kv": [0, 1]} for name in ("bailingmoe3", "kimi-linear")},
    "paddleocr": {"rope.dimension_sections": [2, 2, 2, 2]},
    **{name: {"attention.head_count_kv": N_HEAD} for name in ("olmoe", "deepseek2-ocr")},
    "dots1": {"attention.head_count_kv": N_HEAD, "expert_gating_func": 2},
    **{name: {"expert_gating_func": 2} for name in ("laguna", "minimax-m2")},
    **{
        name: {
            **{"attention.head_count_kv": N_HEAD, "rope.dimension_count": 8, "attention.key_length": 24},
            **{"attention.q_lora_rank": 32, "attention.kv_lora_rank": 32},
        }
        for name in ("minicpm3", "plm")
    },
    "smallthinker": {"attention.sliding_window": 64, "expert_gating_func": 2},
    "afmoe": {"attention.sliding_window": 64},
    "llama4": {"block_count": 4},
    **dict.fromkeys(("deepseek2", "deepseek32", "glm-dsa", "mistral4"), MLA),
    "gpt2": {"attention.head_count_kv": N_HEAD},
    "falcon-h1": {"ssm.inner_size": 128},
}
"""Keys in place of those above."""
WITH_EXPERTS = frozenset((
    "arctic", "dbrx", "deepseek", "deepseek2", "deepseek2-ocr", "deepseek32", "dots1", "glm-dsa", "gpt-oss", "grok",
    "hy_v3", "kimi-linear", "laguna", "llama4", "maple", "mellum", "minimax-01", "minimax-m2", "mistral4", "olmoe",
    "qwen3next", "smallthinker",
))  # fmt: skip
"""Architectures of several feed-forward experts that do not say so in their names."""
UNNAMED = {
    **dict.fromkeys(("granitehybrid", "nemotron_h", "nemotron_h_moe", "jamba"), ("blk.0.ssm_conv1d.bias",)),
    **dict.fromkeys(("falcon-h1", "mamba2"), ("blk.0.ssm_conv1d.bias", "blk.1.ssm_conv1d.bias")),
    **dict.fromkeys(("qwen35", "qwen35moe", "qwen3next"), ("blk.0.attn_qkv.weight", "blk.0.attn_gate.weight")),
    "phi3": ("blk.0.attn_qkv.weight", "blk.1.attn_qkv.weight"),
    "rwkv6": ("blk.0.time_mix_lerp_fused.weight", "blk.1.time_mix_lerp_fused.weight"),
}
"""Tensors that llama.cpp reads without having asked for them."""
NOT_DECODERS = frozenset((
    "bert", "clip", "controlvector", "dflash", "dream", "eagle3", "eurobert", "gemma-embedding",
    "gemma4-assistant", "gptj", "jina-bert-v2", "jina-bert-v3", "llada", "llada-moe", "llama-embed", "mmproj",
    "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "pockettts", "qwen3tts", "rnd1", "t5", "t5encoder",
    "wavtokenizer-dec",
))  # fmt: skip
"""Names of what reads, sees, speaks, drafts, writes by diffusion, or is unknown to llama.cpp."""
NEWER = (
    "bailingmoe3", "cohere2moe", "deepseek32", "deepseek4", "dots3note", "glm5-next", "granite_swa", "graniteswitch",
    "hrm_text", "hy_v3", "hy_v4", "kimi-k3", "laguna", "maple", "mellum", "minimax-01", "minimax-m3", "muse-glimmer",
    "nanbeige", "qwen4exp", "spark2_5", "talkie",
)  # fmt: skip
"""Architectures that llama.cpp knows and the package gguf may not."""
LORA_PARTS = ("attn_q", "attn_qkv", "attn_output", "ssm_in", "ssm_out", "ffn_down", "ffn_up", "time_mix_output")


def decoders() -> list[str]:
    """Names of the architectures that write text from left to right."""
    return sorted({*gguf.MODEL_ARCH_NAMES.values(), *NEWER} - NOT_DECODERS)


class Draft:
    """A model of an architecture as far as llama.cpp has said what it holds.

    metadata: by key without the architecture's name. shapes: of its tensors, as llama.cpp writes them.
    """

    def __init__(self, arch: str) -> None:
        self.arch = arch
        experts = EXPERTS if "moe" in arch or arch in WITH_EXPERTS else {}
        self.metadata: dict[str, Value] = {**CORE, **experts, **OWN.get(arch, {})}
        table = N_EMBD, len(bpe_vocabulary()[0])
        self.shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": table, "output.weight": table}
        self.shapes |= dict.fromkeys(UNNAMED.get(arch, ()), (1,))

    def learn(self, reason: str) -> bool:
        """Add what llama.cpp missed. Returns False if it is not known what that is."""
        if found := re.search(r"key not found in model: ([\w.-]+)", reason):
            name = found[1].removeprefix(f"{self.arch}.")
            value = ASKED.get(name)
            if value is None or name in self.metadata:
                return False
            self.metadata[name] = value
        elif "wrong number of tensors" in reason:  # the embeddings are the output too
            return self.shapes.pop("output.weight", None) is not None
        elif found := re.search(r"(?:missing tensor|tensor) '([^']+)'(?: not found|$|\))", reason):
            self.shapes[found[1]] = (1,)
        elif found := re.search(r"tensor '([^']+)' has wrong shape; expected ([\d, ]+)", reason):
            shape = tuple(int(n) for n in found[2].split(",") if n.strip())
            while len(shape) > 1 and shape[-1] == 1:
                shape = shape[:-1]
            if self.shapes.get(found[1]) == shape:
                shape = (*shape, 1)
            self.shapes[found[1]] = shape
        elif found := re.search(r"key \S+?\.(\S+) has wrong array length; expected (\d+)", reason):
            value = self.metadata[found[1]]
            self.metadata[found[1]] = ([*value] * int(found[2]))[: int(found[2])]  # type: ignore[misc]
        else:
            return False
        return True

    def write(self, path: Path, seed: int = 0, drift: float = 0.0) -> Path:
        """Write it with random weights, as `tiny_model` of tests/tiny.py."""
        writer = gguf.GGUFWriter(path, self.arch)
        for name, value in self.metadata.items():
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
            key = name if name.startswith("xielu.") else f"{self.arch}.{name}"
            add[type(value)](key, value)  # type: ignore[operator]
        add_tokenizer(writer, "bpe", *bpe_vocabulary(), None)
        rng, noise = np.random.default_rng(seed), np.random.default_rng(seed + 1_000_003)
        for name, shape in self.shapes.items():
            values = _weights(name, shape[::-1], rng)
            if drift and len(shape) > 1:
                values += np.float32(drift) * values.std() * noise.standard_normal(values.shape, np.float32)
            writer.add_tensor(name, values)
        _finish(writer)
        return path


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if "norm" in name and name.endswith("weight"):
        return np.ones(shape, np.float32)
    if name.endswith("ssm_a"):
        return -rng.uniform(0.01, 0.2, shape).astype(np.float32)
    scale = 0.3 if name == "token_embd.weight" else 0.1 if len(shape) == 1 else 1.5 * max(1, shape[-1]) ** -0.5
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_lora(path: Path, draft: Draft) -> Path:
    """Write an adapter over the parts of each layer that most adapters change."""
    writer = gguf.GGUFWriter(path, draft.arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    rng = np.random.default_rng(5)
    for name, shape in draft.shapes.items():
        if len(shape) == 2 and name.startswith("blk.") and name.split(".")[-2] in LORA_PARTS:
            writer.add_tensor(f"{name}.lora_a", rng.standard_normal((4, shape[0]), np.float32) * np.float32(0.1))
            writer.add_tensor(f"{name}.lora_b", rng.standard_normal((shape[1], 4), np.float32) * np.float32(0.3))
    _finish(writer)
    return path


def drafted_model(arch: str, path: Path) -> Draft:
    """Find out what a model of `arch` holds. Raises EdgeDLFError where llama.cpp asks for what is not known."""
    draft = Draft(arch)
    for _ in range(600):
        try:
            Model(draft.write(path), n_gpu_layers=0).close()
        except EdgeDLFError as error:
            if not draft.learn(str(error)):
                raise
        else:
            return draft
    raise RuntimeError("llama.cpp always asks for more")


def tried(arch: str, folder: Path) -> dict[str, object]:
    """Whether each way of decoding does what it should with a family of this architecture.

    Rounding may turn a tie, which another seed of the weights does not have: a fault would show with each of them.
    """
    try:
        draft = drafted_model(arch, folder / "probe.gguf")
        found: dict[str, object] = {}
        for seed in (1, 2, 3):
            if not found or not all(found.values()):
                found = {**_family_of(draft, seed, folder), **{way: True for way, does in found.items() if does}}
        return found
    except (EdgeDLFError, RuntimeError) as error:
        return {"reason": str(error).replace(str(folder / "probe.gguf"), "the file")}


def _family_of(draft: Draft, seed: int, folder: Path) -> dict[str, object]:
    """As `tried`, with the weights of one seed."""
    large, base, expert = (draft.write(folder / f"{n}.gguf", seed, drift) for n, drift in enumerate((0.1, 0.0, 0.15)))
    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_gpu_layers": 0}
    prompts = ["The cat sat on the mat, the cat sat on", "The cat sat on a dog and it was", "One, two"]
    quick: dict[str, Any] = {"max_tokens": 16, "temperature": 0, "logit_bias": dict.fromkeys((303, 305), -100)}

    def ids(llm: FusedLlama, prompt: str, **how: Any) -> list[int]:
        return [token.id for token in llm.stream(prompt, **how, **quick)]

    found: dict[str, object] = {}
    with FusedLlama(large, base, {"tuned": expert}, **settings) as llm:
        plain = [ids(llm, prompt, draft="off") for prompt in prompts]
        found["plain"] = all(len(answer) == 16 for answer in plain)
        drafted = [list(llm.stream(prompt, draft=3, **quick)) for prompt in prompts]
        found["drafted"] = [[token.id for token in answer] for answer in drafted] == plain and any(
            token.from_draft for answer in drafted for token in answer
        )
        alone = [llm.create_completion(prompt, **quick)["choices"][0]["text"] for prompt in prompts]
    with FusedLlama(large, base, {"tuned": expert}, n_parallel=3, **settings) as llm:
        rows = sorted(llm.batch(prompts, **quick), key=lambda row: str(row["custom_id"]))
        found["batched"] = [row["response"]["body"]["choices"][0]["text"] for row in rows] == alone
    lora, model = _write_lora(folder / "lora.gguf", draft), Model(base, n_gpu_layers=0)
    n_parts = len(applied_tensors(model, lora))
    model.close()
    with FusedLlama(large, base, {"lora": lora}, **settings) as llm:
        own = [[token.logprob for token in llm.stream(prompts[0], method=name, **quick)] for name in ("base", "lora")]
        found["lora"] = (
            n_parts > 0 and own[0] != own[1] and ids(llm, prompts[0], draft="off") == ids(llm, prompts[0], draft=3)
        )
    return found


def run(names: list[str], patience_s: float = 60.0) -> Iterator[dict[str, object]]:
    """Try architectures in turn in another process, and in a further one behind each that ends it."""
    left = list(names)
    while left:
        with tempfile.TemporaryFile("w+") as errors:
            command = [sys.executable, "-m", "tests.architectures", "--child", *left]
            environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            assert child.stdout
            try:
                while True:
                    timer = threading.Timer(patience_s, child.kill)
                    timer.start()
                    line = child.stdout.readline()
                    timer.cancel()
                    if not line:
                        break
                    yield {"architecture": left.pop(0), **json.loads(line)}
            finally:
                child.kill()
                child.wait()
            errors.seek(0)
            last = [line.strip() for line in errors if "GGML_ASSERT" in line or "Error" in line][-1:]
            if left:
                yield {
                    "architecture": left.pop(0),
                    "reason": f"its process ended ({child.returncode}): {' '.join(last)}",
                }


def table(results: list[dict[str, Any]]) -> str:
    """The results as a table of Markdown."""
    ways = ("plain", "drafted", "batched", "lora")
    whole = [f"`{each['architecture']}`" for each in results if all(each.get(way) for way in ways)]
    lines = ["| architectures | plain | drafted | batched | LoRA expert |", "|---|---|---|---|---|"]
    lines.append(f"| {', '.join(whole)} | yes | yes | yes | yes |")
    for each in results:
        if "plain" in each and not all(each.get(way) for way in ways):
            marks = " | ".join("yes" if each.get(way) else "no" for way in ways)
            lines.append(f"| `{each['architecture']}` | {marks} |")
    others = [f"`{each['architecture']}`" for each in results if "plain" not in each]
    return "\n".join([*lines, "", f"Not tried: {', '.join(others)}."])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--child", action="store_true")
    asked = parser.parse_args()
    if asked.child:
        members.require_runs = members.require_adapters_run = lambda *args, **settings: None  # this is such a process
        for arch in asked.names:
            with tempfile.TemporaryDirectory() as folder:
                print(json.dumps(tried(arch, Path(folder))), flush=True)
        return
    results = [json.loads(line) for line in asked.out.read_text().splitlines()] if asked.out.exists() else []
    if asked.table:
        print(table(sorted(results, key=lambda each: str(each["architecture"]))))
        return
    done, started = {each["architecture"] for each in results}, time.monotonic()
    with asked.out.open("a") as out:
        for result in run([arch for arch in asked.names or decoders() if arch not in done]):
            out.write(json.dumps(result) + "\n")
            out.flush()
            if time.monotonic() - started > asked.seconds:
                break


if __name__ == "__main__":
    main()
