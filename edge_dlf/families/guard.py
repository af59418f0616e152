"""Runs a model in a process that may crash before it is loaded in this one.

llama.cpp ends its process on some files that no rule here foresees. The result of a trial is remembered by the file's
path, size and time and by the build of llama.cpp, so that each file is tried once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.backend import PLAIN_TOKENS, Run
from ..errors import EdgeDLFError, ModelFileError
from ..gguf.info import MERGE, GGUFInfo, read_info
from ..llama import gpus, system_info
from ..system.child import python_command
from ..system.remembered import recall, remember, states

if TYPE_CHECKING:
    from ..llama import LlamaBackend

Adapters = Sequence[tuple[Path, float]]

RUNS = frozenset((
    "afmoe", "apertus", "arcee", "arctic", "arwkv7", "baichuan", "bailingmoe", "bailingmoe2", "bailingmoe3",
    "bitnet", "bloom", "chatglm", "codeshell", "cohere2", "cohere2moe", "command-r", "dbrx", "deci", "deepseek",
    "deepseek2", "deepseek2-ocr", "dots1", "ernie4_5", "ernie4_5-moe", "exaone", "exaone-moe", "exaone4", "falcon",
    "falcon-h1", "gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "glm4", "glm4moe", "gpt-oss", "gpt2", "gptneox",
    "granite", "granite_swa", "granitehybrid", "granitemoe", "grok", "grovemoe", "hunyuan-dense", "hunyuan-moe",
    "hunyuan_vl", "hy_v3", "internlm2", "jais", "jais2", "jamba", "kimi-linear", "lfm2", "lfm2moe", "llama",
    "llama4", "maincoder", "mamba", "mamba2", "maple", "mellum", "mimo2", "minicpm", "minicpm3", "minimax-m2",
    "mistral3", "mistral4", "mpt", "muse-glimmer", "nanbeige", "nemotron", "nemotron_h", "nemotron_h_moe", "olmo",
    "olmo2", "olmoe", "openelm", "orion", "paddleocr", "pangu-embedded", "phi2", "phi3", "phimoe", "plamo",
    "plamo2", "plamo3", "qwen", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen35", "qwen35moe", "qwen3moe",
    "qwen3next", "qwen3vl", "qwen3vlmoe", "refact", "rwkv6", "rwkv6qwen2", "rwkv7", "seed_oss", "smallthinker",
    "smollm3", "spark2_5", "stablelm", "starcoder", "starcoder2", "step35", "talkie", "xverse",
))  # fmt: skip
"""Architectures of which this version of llama.cpp runs models, as `tests/architectures.py` found."""
_COLLECTION = "trials"
_PATIENCE_S = 120.0
_SLOWEST_DISK = 20e6  # bytes a second
_N_TOKENS = 8
_N_ROUNDS = 3
_TRY = f"import sys; from {__name__} import main; main(sys.argv[1])"
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)


@dataclass(frozen=True)
class Trial:
    """The end of a trial run.

    reason: why it failed.
    tps: tokens a second that the model decoded.
    batch_s: fewest seconds in which it evaluated each number of tokens that was asked for, at once.
    is_final: whether another trial would end the same.
    """

    ok: bool
    reason: str = ""
    tps: float = 0.0
    batch_s: list[float] = field(default_factory=list)
    is_final: bool = True


def require_runs(info: GGUFInfo, n_gpu_layers: int, split: Sequence[float] = ()) -> None:
    """Try a model whose architecture is none of `RUNS`, its layers on the GPUs that `Model` will use.

    The result of an earlier trial holds as long as the files and the build of llama.cpp are the same.
    Raises ModelFileError if the model does not run.
    """
    if info.architecture in RUNS:
        return
    found = _remembered(info.shards) or try_model(info.shards, n_gpu_layers=n_gpu_layers, split=split)
    if not found.ok:
        raise ModelFileError(info.path, f"cannot be used, as a try in another process showed: {found.reason}")


def require_adapters_run(
    base: GGUFInfo, experts: Mapping[str, Adapters], n_gpu_layers: int, split: Sequence[float] = ()
) -> None:
    """Try LoRA experts, by name, over the base, before any of them is loaded in this process.

    The results of earlier trials hold as long as the files and the build of llama.cpp are the same.
    Raises ModelFileError if llama.cpp crashes on an adapter, or leaves a part of it out.
    """
    where: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "split": split}
    new = [adapters for adapters in experts.values() if _remembered(base.shards, adapters) is None]
    if len(new) > 1 and (found := try_model(base.shards, [pair for adapters in new for pair in adapters], **where)).ok:
        for adapters in new:
            remember(_COLLECTION, _key(base.shards, adapters), asdict(found))
    for adapters in experts.values():
        found = _remembered(base.shards, adapters) or try_model(base.shards, adapters, **where)
        if not found.ok and found.is_final:
            names = ", ".join(str(path) for path, _ in adapters)
            reason = f"cannot be used over {base.path.name}, as a try in another process showed: {found.reason}"
            raise ModelFileError(names, reason, MERGE)


def try_model(
    shards: Sequence[Path],
    loras: Adapters = (),
    *,
    n_gpu_layers: int = -1,
    split: Sequence[float] = (),
    patience_s: float | None = None,
    batches: Sequence[int] = (),
) -> Trial:
    """Load the model in `shards`, `loras` over it, in another process, decode a few tokens, and remember the result.

    batches: numbers of tokens to time together.
    """
    key = _key(shards, loras)
    patience_s = patience_s or _PATIENCE_S + sum(path.stat().st_size for path in shards) / _SLOWEST_DISK
    question = {
        "model": str(shards[0]),
        "loras": [(str(path), scale) for path, scale in loras],
        "gpu": {"n_gpu_layers": n_gpu_layers, "split": list(split)},
        "batches": list(batches),
    }
    found = _run(question, patience_s)
    if found.is_final:
        remember(_COLLECTION, key, asdict(found))
    return found


def _remembered(shards: Sequence[Path], loras: Adapters = ()) -> Trial | None:
    with suppress(TypeError):
        return Trial(**recall(_COLLECTION, _key(shards, loras)))
    return None


def _run(question: Mapping[str, Any], patience_s: float) -> Trial:
    command = python_command(_TRY, json.dumps(question))
    env = {**os.environ, "GGML_NO_BACKTRACE": "1"}
    try:
        # Its own session: Ctrl-C in the terminal is for this process, which then ends it.
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=patience_s, start_new_session=True, env=env
        )
    except subprocess.TimeoutExpired:
        return Trial(False, f"did not answer within {patience_s:.0f} s", is_final=False)
    with suppress(ValueError, TypeError, IndexError):
        return Trial(**json.loads(done.stdout.splitlines()[-1]))
    code = done.returncode
    if code == -signal.SIGKILL:
        return Trial(False, "its process was killed, as the system does where memory runs out", is_final=False)
    if -code in _CRASHES:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        return Trial(False, f"llama.cpp crashed ({': '.join([signal.Signals(-code).name, *last])})")
    return Trial(False, f"its process ended with code {code}", is_final=False)


def main(question: str) -> None:
    """Run a trial in this, the other process, and print its result as one line of JSON."""
    asked = json.loads(question)
    try:
        loras = [(Path(path), scale) for path, scale in asked["loras"]]
        found = _decode(Path(asked["model"]), loras, asked["gpu"], asked["batches"])
    except EdgeDLFError as error:
        found = Trial(False, str(error), is_final=error.exit_code == 3)
    print(json.dumps(asdict(found)), flush=True)


def _decode(path: Path, loras: Adapters, gpu: Mapping[str, Any], batches: Sequence[int]) -> Trial:
    import numpy as np

    from ..llama import LlamaBackend, Model, applied_tensors

    model = Model(path, **gpu, weights=read_info(path).tensors)
    tokens = model.tokenize(b"The capital of France is", special=True) or [0]
    if model.adds_bos and model.bos is not None:
        tokens.insert(0, model.bos)
    for lora, _ in loras:
        if unread := sorted(read_info(lora).tensors.keys() - applied_tensors(model, lora)):
            return Trial(False, f"{lora.name}: llama.cpp does not apply {unread[0]}, one of {len(unread)} such tensors")
    for n_ubatch in (kinds := _attentions()):
        backend = LlamaBackend(model, path.name, n_ctx=256, n_ubatch=n_ubatch, loras=loras)
        backend.decode([Run(0, tokens, 1)])
        started = time.perf_counter()
        for _ in range(_N_TOKENS):
            row = backend.logits()[0]
            if not np.isfinite(row).any() or np.isnan(row).any():
                return Trial(False, "its logits are not numbers")
            backend.decode([Run(0, [int(row.argmax())], 1)])
        elapsed = time.perf_counter() - started
        sizes = batches if n_ubatch == kinds[-1] else ()
        batch_s = [min(_evaluate_s(backend, n) for _ in range(_N_ROUNDS)) for n in sizes]
        backend.close()
    return Trial(True, tps=_N_TOKENS / elapsed, batch_s=batch_s)


def _evaluate_s(backend: LlamaBackend, n: int) -> float:
    """Seconds in which n tokens are evaluated at once, with the logits of each."""
    started = time.perf_counter()
    backend.decode([Run(0, [0] * n, n)])
    backend.logits()
    return time.perf_counter() - started


def _key(shards: Sequence[Path], loras: Adapters) -> str:
    """What a result is valid for: path, size and time of every file, scales, the build of llama.cpp, what is tried."""
    paths, scales = [*shards, *(lora for lora, _ in loras)], [scale for _, scale in loras]
    return json.dumps([system_info(), _attentions(), [str(path.resolve()) for path in paths], scales, states(paths)])


def _attentions() -> list[int | None]:
    """`n_ubatch`, as in `MemberPlan`, of each kind of attention that a member may use on this machine."""
    return [None] if gpus() else [None, PLAIN_TOKENS[0]]
