"""Tokens a second of edge-dlf, beside what one would write or run instead, with the same models.

    pip install '.[versus]'
    python benchmarks/versus.py --family FAMILY [--llama-server PATH] [--without-transformers]
                                [--prompts 2] [--tokens 32] [--rounds 3] [--threads N]

FAMILY is a large model, a base, and one expert that is a LoRA over the base. All answer the same prompts with the
likeliest tokens, in turn, the order changing from prompt to prompt. Tokens a second are of decoding alone, from the
first token of an answer to its last, medians; "times" is the median of the ratios to the first row in the same turn;
"equal" counts the answers that are those of another row, token for token.

- NumPy loop: three `Llama` objects of llama-cpp-python, and the paper's Algorithm 1 in NumPy.
- Transformers: Proxy Tuning, that is large + expert - base, with a KV cache. The weights are those of the same files,
  dequantised to float32 and then made bfloat16; the LoRA is merged. It takes turns with two rows of edge-dlf.
- llama-server: the large model alone, and with the base as its draft model. It has no expert: its answers are the large
  model's. Left out without --llama-server; docs/performance.md says how to build it.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Protocol
from urllib.error import URLError
from urllib.request import Request, urlopen

import llama_cpp
import numpy as np
from draft import WORKLOADS

from edge_dlf import FusedLlama
from edge_dlf.families.files import FamilyFiles
from edge_dlf.llama import default_n_threads

N_CTX = 512
ALPHAS = np.arange(21) / 10
ROLES = "large", "base", "base"  # whose files the three models of others are of; the LoRA goes over the last


class Contender(Protocol):
    name: str
    equals: str  # the row whose answers it should give, or ""

    def tokens(self, prompt: list[int], n_tokens: int) -> Iterator[int]:
        """Answer greedily, with `n_tokens` tokens at most."""


@dataclass
class EdgeDLF:
    llm: FusedLlama
    name: str
    settings: dict[str, Any]
    equals: str = ""

    def tokens(self, prompt: list[int], n_tokens: int) -> Iterator[int]:
        for token in self.llm.stream(prompt, max_tokens=n_tokens, temperature=0.0, **self.settings):
            yield token.id


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def search(large: np.ndarray, base: np.ndarray, expert: np.ndarray) -> float:
    """α by Algorithm 1 of the paper, for one expert."""
    log_p, log_q, log_expert = log_softmax(large), log_softmax(base), log_softmax(expert)
    p, difference = np.exp(log_p), log_expert - log_q
    forward, reverse = np.exp(log_expert) @ difference, -np.exp(log_q) @ difference
    objectives = []
    for alpha in ALPHAS.astype(large.dtype):
        log_fused = log_softmax(log_p + alpha * difference)
        moved = log_fused - log_p
        objectives.append((np.exp(log_fused) @ moved - forward) ** 2 + (-p @ moved - reverse) ** 2)
    return float(ALPHAS[np.argmin(objectives)])


class NumPyLoop:
    """`Llama` objects for large, base and expert, decoded one after the other; fused: the row last chosen from."""

    def __init__(self, models: Sequence[llama_cpp.Llama], dtype: str) -> None:
        self.name, self.equals = f"NumPy loop, {dtype}", "edge-dlf, undrafted"
        self.models, self.dtype, self.fused = models, dtype, np.empty(0)

    @staticmethod
    def load(files: FamilyFiles, n_threads: int) -> Iterator[llama_cpp.Llama]:
        (((lora, scale),),) = files.loras.values()
        for role, settings in zip(ROLES, ({}, {}, {"lora_path": str(lora), "lora_scale": scale}), strict=True):
            settings |= {"n_ctx": N_CTX, "n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False}
            yield llama_cpp.Llama(str(files.models[role].path), **settings)

    def row(self, model: llama_cpp.Llama) -> np.ndarray:
        """Scores of the last position, read in place, which `Llama.scores` would copy for every position."""
        row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
        return row[: min(each.n_vocab() for each in self.models)].astype(self.dtype)

    def tokens(self, prompt: list[int], n_tokens: int) -> Iterator[int]:
        for model in self.models:
            model.reset()
        new = prompt
        for _ in range(n_tokens):
            for model in self.models:
                model.eval(new)
            large, base, expert = map(self.row, self.models)
            self.fused = large + search(large, base, expert) * (expert - base)
            new = [int(self.fused.argmax())]
            if llama_cpp.llama_vocab_is_eog(llama_cpp.llama_model_get_vocab(self.models[0].model), *new):
                return
            yield new[0]


class ProxyTuning:
    """Three models of Transformers with the weights of the GGUF files."""

    def __init__(self, files: FamilyFiles, n_threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, GgufConfig

        torch.set_num_threads(n_threads)
        self.torch, self.name, self.equals = torch, "", "edge-dlf, static"
        load = partial(AutoModelForCausalLM.from_pretrained, quantization_config=GgufConfig(dequantize=True))
        paths = [files.models[role].path for role in ROLES[:2]]
        large, base = (load(path.parent, gguf_file=path.name, dtype=torch.float32) for path in paths)
        self.models = [large, base, deepcopy(base)]
        self.merge(self.models[-1], *next(iter(files.loras.values()))[0])

    def cast(self, dtype: str) -> None:
        self.name = f"Transformers, {dtype}"
        for model in self.models:
            model.to(getattr(self.torch, dtype))

    def merge(self, model: Any, lora: Path, scale: float) -> None:
        """Add an adapter's products to the weights that they go over."""
        from gguf import MODEL_ARCH_NAMES, GGUFReader, dequantize, get_tensor_name_map

        reader = GGUFReader(lora)
        parts = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
        alpha, architecture = (reader.fields[key].contents() for key in ("adapter.lora.alpha", "general.architecture"))
        (arch,) = (key for key, name in MODEL_ARCH_NAMES.items() if name == architecture)
        names = get_tensor_name_map(arch, model.config.num_hidden_layers)
        for name, weight in model.named_parameters():
            tensor = names.get_name(name, (".weight",))
            if (a := parts.pop(f"{tensor}.lora_a", None)) is not None:
                product = parts.pop(f"{tensor}.lora_b") @ a
                weight.data += self.torch.from_numpy(scale * alpha / len(a) * product)
        assert not parts, f"no weights for {', '.join(parts)}"

    def tokens(self, prompt: list[int], n_tokens: int) -> Iterator[int]:
        new, caches = prompt, [None] * len(self.models)
        for _ in range(n_tokens):
            rows = []
            for n, model in enumerate(self.models):
                with self.torch.inference_mode():
                    ids = self.torch.tensor([new])
                    output = model(ids, past_key_values=caches[n], use_cache=True, logits_to_keep=1)
                caches[n] = output.past_key_values
                rows.append(output.logits[0, -1])
            large, base, expert = (row[: min(map(len, rows))] for row in rows)
            new = [int((large + expert - base).argmax())]
            if new == [self.models[0].config.eos_token_id]:
                return
            yield new[0]


class LlamaServer:
    """A server in a process of its own, which is asked for tokens as they come."""

    def __init__(self, program: Path, name: str, equals: str, arguments: Sequence[object]) -> None:
        self.name, self.equals = name, equals
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [program, "--host", "127.0.0.1", "--port", port, "--ctx-size", N_CTX, "--parallel", 1, *arguments]
        self.process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not self.is_ready():
            if self.process.poll() is not None:
                raise SystemExit(f"exit status {self.process.returncode}: {' '.join(map(str, command))}")
            time.sleep(0.1)

    @classmethod
    def start(cls, program: Path | None, files: FamilyFiles, n_threads: int) -> Iterator[LlamaServer]:
        large, base = (files.models[role].path for role in ROLES[:2])
        arguments = ["--model", large, "--threads", n_threads]
        draft = ["--spec-type", "draft-simple", "--model-draft", base, "--threads-draft", n_threads]
        if program:
            alone = "llama-server, large alone"
            yield cls(program, alone, "edge-dlf, large alone", arguments)
            yield cls(program, "llama-server, large drafted by base", alone, [*arguments, *draft])

    def is_ready(self) -> bool:
        try:
            return urlopen(f"{self.url}/health").status == 200
        except URLError:
            return False

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()

    def tokens(self, prompt: list[int], n_tokens: int) -> Iterator[int]:
        body = {"prompt": prompt, "n_predict": n_tokens, "temperature": 0, "stream": True, "return_tokens": True}
        request = Request(f"{self.url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request) as events:
            for line in events:
                if line.startswith(b"data: "):
                    yield from json.loads(line.removeprefix(b"data: ")).get("tokens", ())


class Results:
    """speeds, answers: by contender and turn."""

    def __init__(self, contenders: Sequence[Contender], prompts: Sequence[list[int]], n_tokens: int) -> None:
        self.speeds: dict[str, list[float]] = defaultdict(list)
        self.answers: dict[str, list[list[int]]] = defaultdict(list)
        for number, prompt in enumerate(prompts):
            first = number % len(contenders)
            for contender in [*contenders[first:], *contenders[:first]]:
                timed = [(token, time.perf_counter()) for token in contender.tokens(prompt, n_tokens)]
                self.speeds[contender.name].append((len(timed) - 1) / (timed[-1][1] - timed[0][1]))
                self.answers[contender.name].append([token for token, _ in timed])

    def row(self, contender: Contender, reference: Contender) -> str:
        speeds, same = self.speeds[contender.name], ""
        ratio = median(a / b for a, b in zip(speeds, self.speeds[reference.name], strict=True))
        if contender.equals:
            pairs = [*zip(self.answers[contender.name], self.answers[contender.equals], strict=True)]
            same = f"{sum(a == b for a, b in pairs)} of {len(pairs)}: {contender.equals}"
        return f"| {contender.name} | {median(speeds):.2f} | {ratio:.2f} | {same} |"


def near_ties(loop: NumPyLoop, prompts: Sequence[list[int]], results: Results) -> Iterator[str]:
    """Say where the loop first chose another token than edge-dlf, and how far apart the two are in its own row."""
    for number, prompt in enumerate(prompts):
        answer, other = results.answers[loop.name][number], results.answers[loop.equals][number]
        if (n := next((n for n, (a, b) in enumerate(zip(answer, other, strict=False)) if a != b), None)) is not None:
            assert [*loop.tokens(prompt, n + 1)][n] == answer[n]
            nats = loop.fused[answer[n]] - loop.fused[other[n]]
            yield f"{loop.name}: answer {number + 1} differs from token {n + 1} on, by {nats:.3f} nats"


def edge_dlf(llm: FusedLlama) -> Iterator[EdgeDLF]:
    weights = {"large": 0.5, **dict.fromkeys(llm.experts, 0.5)}
    yield EdgeDLF(llm, "edge-dlf, undrafted", {"method": "dynamic", "draft": "off"})
    yield EdgeDLF(llm, "edge-dlf, drafted", {"method": "dynamic", "draft": "auto"}, "edge-dlf, undrafted")
    yield EdgeDLF(llm, "edge-dlf, static", {"method": "static", "draft": "off"})
    yield EdgeDLF(llm, "edge-dlf, weighted, no base", {"method": "weighted", "weights": weights, "draft": "off"})
    yield EdgeDLF(llm, "edge-dlf, large alone", {"method": "large", "draft": "off"})
    yield EdgeDLF(llm, "edge-dlf, large drafted by base", {"method": "large", "draft": "auto"}, "edge-dlf, large alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--llama-server", type=Path, help="the program [leave it out]")
    parser.add_argument("--without-transformers", action="store_true")
    for name, default in {"prompts": 2, "tokens": 32, "rounds": 3, "threads": default_n_threads()}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()

    def measured(contenders: Sequence[Contender]) -> Results:
        print(f"measuring {'; '.join(contender.name for contender in contenders)}", file=sys.stderr, flush=True)
        Results(contenders, prompts[:1], 4)  # compiles, and measures what drafts cost
        return Results(contenders, [*prompts] * options.rounds, options.tokens)

    print("| | tokens/s | times | equal |\n|---|---|---|---|", flush=True)
    with FusedLlama.from_family(options.family, n_ctx=N_CTX, n_threads=options.threads) as llm:
        prompts = [llm.tokenize(text) for text in WORKLOADS["maths"][: options.prompts]]
        ours = [*edge_dlf(llm)]
        with ExitStack() as stack:
            models = [stack.enter_context(closing(model)) for model in NumPyLoop.load(llm.files, options.threads)]
            loops = [NumPyLoop(models, dtype) for dtype in ("float64", "float32")]
            started = LlamaServer.start(options.llama_server, llm.files, options.threads)
            contenders = [*ours, *loops, *(stack.enter_context(closing(server)) for server in started)]
            results = measured(contenders)
            print(*(results.row(contender, ours[0]) for contender in contenders), sep="\n", flush=True)
            ties = [line for loop in loops for line in near_ties(loop, prompts, results)]
        if not options.without_transformers:
            print("loading Transformers", file=sys.stderr, flush=True)
            transformers = ProxyTuning(llm.files, options.threads)
            for dtype in ("float32", "bfloat16"):
                transformers.cast(dtype)
                print(measured([ours[0], ours[2], transformers]).row(transformers, ours[0]), flush=True)
    print(*ties, sep="\n")


if __name__ == "__main__":
    main()
